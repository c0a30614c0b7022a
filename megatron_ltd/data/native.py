"""The compiled part of index building, `index_helpers.cpp`, where the installation has it.

Without it the same arrays are built in Python, which takes minutes where the compiled loops take seconds: from about
ten million samples on.
"""

from types import ModuleType

from megatron_ltd.log import Console

VERSION = 2
"""Of `index_helpers.cpp`: an extension that was compiled from other source is not used."""

_REMEDY = "Install a C++ compiler and run pip install -e . again to build indices of many samples quickly."


def load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    try:
        from megatron_ltd.data import index_helpers
    except ImportError as error:
        return None, f"the compiled index helpers are missing ({error})"
    if index_helpers.VERSION != VERSION:
        return None, f"the compiled index helpers are of version {index_helpers.VERSION}, not {VERSION}"
    return index_helpers, ""


def tell(console: Console) -> None:
    """Says that the extension is missing, if it is; once, so that a run of many processes may say it before they
    need it, with a console that speaks in one of them."""
    module, reason = load()
    if module is None:
        console.warn_once(f"{reason[0].upper()}{reason[1:]}; Python loops take their place. {_REMEDY}")


def helpers() -> ModuleType | None:
    """The extension; where it is missing this is said once, and the caller does the work in Python."""
    tell(Console())
    return load()[0]
