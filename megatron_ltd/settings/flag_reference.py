"""Every flag, read from the dataclasses of `megatron_ltd.config` and the literals under their fields."""

import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import flag_name

_INTEGER = re.compile(r"[+-]?[0-9]{1,40}(_[0-9]{1,40})*")
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}

LONGEST_LIST = 100_000
"""Numbers that a flag takes."""

REQUIRED = {"num_layers": "the number of transformer layers", "hidden_size": "the width of the residual stream",
            "num_attention_heads": "the number of query heads", "seq_length": "the tokens of one sample",
            "lr": "the peak learning rate"}
"""Fields that a user must set, and what they are."""


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
        return flag_name(self.field)

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
        if self.field in REQUIRED:
            return "required"
        if self.kind is bool:
            return "on" if self.default else "off"
        return "" if self.default is None else str(self.default)

    def of(self, config: RunConfig) -> Any:
        """Its value in a configuration."""
        return getattr(getattr(config, self.section), self.field)

    def spoken(self, value: Any) -> str:
        """The setting with a value, as messages name it: `--lr = 0.1`, `--bf16`, `--no-bf16`."""
        if self.kind is bool:
            return self.name if value else str(self.off_name)
        return f"{self.name} = {' '.join(map(str, value)) if isinstance(value, tuple) else value}"

    def from_words(self, name: str, words: Sequence[str]) -> Any:
        """The value that a flag on the command line stands for.

        Args:
            name: the flag as given, which may be `off_name`.
            words: that follow it.

        Raises:
            ValueError: they stand for none; the message says what is wrong, and what is wanted.
        """
        given = " ".join(words)
        if self.kind is int and self.count is None and "[" in given and set("*+") & set(given):
            words = [str(number) for number in list_of(name, given)]
        elif self.kind is int and self.count != 1 and len(words) == 1 and (words[0][0] in "([" or "," in words[0]):
            words = words[0].strip("()[]").replace(",", " ").split()  # as Megatron-LM writes it: (127,0) or 127,0
        if self.kind is bool and words:
            raise ValueError(f"{name} takes no value, but {given!r} follows it; leave that out")
        if self.kind is bool:
            return name == self.name
        if len(words) != self.count and (self.count is not None or not words):
            wanted = _KINDS[self.kind] if self.count == 1 else f"{self.count or 'one or more'} values"
            raise ValueError(f"{name} needs {wanted}, but {repr(given) if words else 'nothing'} follows it; "
                             f"write {self.usage}")
        try:
            values = tuple(self._one(word) for word in words)
        except ValueError as error:
            raise ValueError(f"{name} = {given}: {error}") from None
        return values[0] if self.count == 1 else values

    def from_toml(self, value: Any) -> Any:
        """The value that a TOML value stands for.

        Raises:
            ValueError: it stands for none; the message says what is wanted.
        """
        if self.count == 1 or self.kind is bool:
            return self._one_typed(value)
        if not isinstance(value, list) or not value or (self.count is not None and len(value) != self.count):
            raise ValueError(f"must be a list of {self.count or 'one or more'} values, not {value!r}")
        return tuple(self._one_typed(item) for item in value)

    def _one(self, word: str) -> Any:
        if self.kind is int and not _INTEGER.fullmatch(word):
            raise ValueError(f"{word!r} is not a whole number; write it in digits, such as 1000")
        try:
            value = self.kind(word)
        except ValueError:
            raise ValueError(f"{word!r} is not a number; write it as 0.1 or 1e-4") from None
        return self._checked(value)

    def _one_typed(self, value: Any) -> Any:
        accepted: Any = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError(f"must be {_KINDS[self.kind]}, not {value!r}")
        return self._checked(value)

    def _checked(self, value: Any) -> Any:
        if self.kind is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"{value} does not fit into 64 bits; write a smaller number")
        if self.kind is float and not abs(value) <= sys.float_info.max:
            raise ValueError(f"{value} is not a number that is finite; write it as 0.1 or 1e-4")
        if self.kind is str and not value.strip():
            raise ValueError("is empty text; give a value, or leave it out")
        if self.choices and value not in self.choices:
            raise ValueError(f"{value!r} is none of the choices: {', '.join(self.choices)}")
        return self.kind(value)


def list_of(name: str, text: str) -> list[int]:
    """The numbers that a flag has in Megatron-LM's scripts as sums and multiples of lists: `([1]*3+[0])*8`.

    Raises:
        ValueError: it is something else, or longer than any stack of layers.
    """
    wrong = ValueError(f"{name} = {text[:200]}: no list of whole numbers; write it as [1,1,1,0] or ([1]*3+[0])*8")

    def numbers(node: ast.expr) -> list[int]:
        match node:
            case ast.List(elts=items) if all(isinstance(item, ast.Constant) and type(item.value) is int
                                             for item in items):
                return [ast.literal_eval(item) for item in items]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return numbers(left) + numbers(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))):
                if len(found := numbers(left)) * times <= LONGEST_LIST:
                    return found * times
        raise wrong

    try:
        return numbers(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise wrong from None


@functools.cache
def all_flags() -> tuple[Flag, ...]:
    """Every flag, in the order of the sections and their fields; no two sections have a field of the same name."""
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
def flags_by_field() -> dict[str, Flag]:
    return {flag.field: flag for flag in all_flags()}


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values of these fields."""
    for field, value in settings.items():
        name = flags_by_field()[field].section
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **{field: value})})
    return config


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
