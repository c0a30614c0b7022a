"""Shared by the tools: a parser whose help is the tool's docstring, and exit codes instead of tracebacks.

Inputs are flags, and what a tool writes is named by --output. Names that a tool had before still work.
"""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_ltd.errors import EXIT_INTERNAL, UserError, memory_shortage
from megatron_ltd.log import Console


class _Stored(argparse.Action):
    """Keeps the value of a flag; of a flag with a list, given several times, all values."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        earlier = getattr(namespace, self.dest, None)
        if self.nargs == "+" and self.option_strings and earlier is not None and earlier is not self.default:
            values = [*earlier, *values]
        setattr(namespace, self.dest, values)


def parser_of(doc: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring.

    Args:
        doc: the module's docstring.
        settings: further arguments of `ArgumentParser`.
    """
    summary, _, rest = (doc or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
    parser.register("action", None, _Stored)
    return parser


def add_output(parser: argparse.ArgumentParser, *older: str, **settings: Any) -> None:
    """Add --output.

    Args:
        older: other names of the flag.
        settings: further arguments of `add_argument`.
    """
    parser.add_argument("--output", *older, dest="output", **settings)


def exit_code_of(run: Callable[[], None], console: Console | None = None) -> int:
    """The exit code of a program; an error that the user can repair is one message.

    Args:
        console: prints the message.
    """
    try:
        run()
    except UserError as error:
        (console or Console()).error(f"{type(error).__name__}: {error}")
        return error.exit_code
    except Exception as error:
        shortage = memory_shortage(error)
        if shortage is None:
            raise
        Console().error(f"memory ran out: {shortage}\nGive fewer or smaller things at once, such as "
                        "--micro-batch-size or --workers where the tool has it, or use a machine with more memory.")
        return EXIT_INTERNAL
    return 0
