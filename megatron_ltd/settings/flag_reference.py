"""Every flag, read from the dataclasses of `megatron_ltd.config` and the literals under their fields."""

import ast
import dataclasses
import functools
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any

from megatron_ltd.config import RunConfig

_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One setting.

    Args:
        section: field of `RunConfig` that holds it.
        field: its name there.
        kind: of one value: bool, int, float or str.
        choices: allowed values; empty where any of the kind is.
        count: values it takes: 1, a larger fixed number, 0 for a switch, or None for one or more.
        default: None where nothing is set.
        text: its documentation, on one line.
    """

    section: str
    field: str
    kind: type
    choices: tuple[str, ...]
    count: int | None
    default: Any
    text: str

    @property
    def name(self) -> str:
        return "--" + self.field.replace("_", "-")

    @property
    def off_name(self) -> str | None:
        """The flag that turns a switch off; none for the few that already begin with --no."""
        return None if self.kind is not bool or self.field.startswith("no_") else "--no-" + self.name[2:]

    @property
    def usage(self) -> str:
        """The flag with placeholders for its values."""
        if self.kind is bool:
            return self.name if self.default is False else f"{self.name} / {self.off_name}"
        value = "{" + ",".join(self.choices) + "}" if self.choices else {int: "N", float: "X", str: "TEXT"}[self.kind]
        return f"{self.name} " + (f"{value} ..." if self.count is None else " ".join([value] * self.count))

    @property
    def default_text(self) -> str:
        """The default as a user would write it; empty where there is none, or the text tells it."""
        required = self.field in _REQUIRED
        if self.default is None or required:
            return "required" if required else ""
        return {True: "on", False: "off"}[self.default] if self.kind is bool else str(self.default)

    def from_words(self, words: Sequence[str]) -> Any:
        """The value that the words after the flag stand for.

        Raises:
            ValueError: they stand for none; the message says what is wrong, and what is wanted.
        """
        if self.kind is bool:
            if words:
                raise ValueError(f"takes no value, but {' '.join(words)!r} follows it; leave that out")
            return True
        wanted = _NAMES[self.kind] if self.count == 1 else f"{self.count or 'one or more'} values"
        if len(words) != self.count and (self.count is not None or not words):
            got = f"{' '.join(words)!r}" if words else "nothing"
            raise ValueError(f"needs {wanted}, but {got} follows it; write {self.usage}")
        values = tuple(self._one(word) for word in words)
        return values[0] if self.count == 1 else values

    def from_toml(self, value: Any) -> Any:
        """The value that a TOML value stands for.

        Raises:
            ValueError: as above.
        """
        if self.count == 1 or self.kind is bool:
            return self._one_typed(value)
        if not isinstance(value, list) or not value or (self.count is not None and len(value) != self.count):
            raise ValueError(f"must be a list of {self.count or 'one or more'} values, not {value!r}")
        return tuple(self._one_typed(item) for item in value)

    def _one(self, word: str) -> Any:
        if self.kind is int:
            if not _INTEGER.fullmatch(word):
                raise ValueError(f"{word!r} is not a whole number; write it in digits, such as 1000")
            return self._bounded(int(word))
        if self.kind is float:
            try:
                return self._finite(float(word))
            except ValueError:
                raise ValueError(f"{word!r} is not a number; write it as 0.1 or 1e-4") from None
        return self._chosen(word)

    def _one_typed(self, value: Any) -> Any:
        accepted: Any = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError(f"must be {_NAMES[self.kind]}, not {value!r}")
        if self.kind is float:
            return self._finite(float(value))
        if self.kind is int:
            return self._bounded(value)
        return self._chosen(value) if self.kind is str else value

    def _bounded(self, value: int) -> int:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{value} does not fit into 64 bits; write a smaller number")
        return value

    def _finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number; write it as 0.1 or 1e-4")
        return value

    def _chosen(self, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty text; give a value, or leave it out")
        if self.choices and value not in self.choices:
            raise ValueError(f"{value!r} is none of the choices: {', '.join(self.choices)}")
        return value


_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "lr")


@functools.cache
def all_flags() -> tuple[Flag, ...]:
    """Every flag, in the order of the sections and their fields."""
    flags = []
    for section, kind in section_classes().items():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if not field.metadata.get("flag", True):
                continue
            value_kind, choices, count = _shape(hints[field.name])
            flags.append(Flag(section, field.name, value_kind, choices, count, field.default,
                              _documentation(kind)[field.name]))
    return tuple(flags)


@functools.cache
def section_classes() -> dict[str, Any]:
    """The dataclass of each section of `RunConfig`."""
    return typing.get_type_hints(RunConfig)


@functools.cache
def _documentation(kind: type) -> dict[str, str]:
    """The literal under each field of a dataclass and of those it is composed of, by name of field."""
    texts = {}
    for part in (part for part in kind.__mro__ if dataclasses.is_dataclass(part)):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(node, ast.ClassDef)
        for field, literal in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) \
                    and isinstance(literal, ast.Expr) and isinstance(literal.value, ast.Constant):
                texts[field.target.id] = " ".join(str(literal.value.value).split())
    return texts


def _shape(hint: Any) -> tuple[type, tuple[str, ...], int | None]:
    """Kind of one value, its choices, and how many values a field of this type takes."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return str, parts, 1
    if origin is tuple:
        return parts[0], (), None if parts[-1] is Ellipsis else len(parts)
    return hint, (), 0 if hint is bool else 1
