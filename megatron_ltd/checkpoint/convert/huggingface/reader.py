"""Reads the entries of a Hugging Face config.json one by one."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ltd.checkpoint.convert.huggingface.families import COMPUTED_ELSEWHERE, DEFAULTS, DERIVED

Values = Mapping[str, Any]

LARGEST_SIZE = 1 << 24
"""Of anything: larger numbers are damage."""


class Reader:
    """Reads entries, and keeps account of which were read and of what is wrong with them."""

    def __init__(self, config: Values):
        self.config = config
        self.read: set[str] = set()
        self.problems: list[str] = []

    def any(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def default(self, name: str, sizes: Values) -> Any:
        """Its value if the file says null, or nothing."""
        defaults = DEFAULTS[self.config["model_type"]]
        if name in DERIVED and (name in self.config or name not in defaults):
            return DERIVED[name](sizes)
        return defaults.get(name)

    def size(self, name: str, sizes: Values) -> int:
        """A number of things, at least one."""
        value = self.any(name, self.default(name, sizes))
        fits = type(value) is int and 1 <= value <= LARGEST_SIZE
        return value if fits else self.wrong(name, value, f"must be a whole number from 1 to {LARGEST_SIZE}", 1)

    def number(self, name: str, sizes: Values) -> float:
        value = self.any(name, self.default(name, sizes))
        fits = type(value) in (int, float) and value > 0
        return float(value) if fits else self.wrong(name, value, "must be a number above 0", 1.0)

    def flag(self, name: str, default: bool) -> bool:
        value = self.any(name, default)
        return value if isinstance(value, bool) else self.wrong(name, value, "must be true or false", default)

    def must_be(self, name: str, allowed: tuple[Any, ...]) -> None:
        self.read.add(name)
        if name in self.config and self.config[name] not in allowed:
            self.wrong(name, self.config[name], f"only {allowed[0]!r} is supported")

    def must_agree(self, names: Mapping[str, str]) -> None:
        """Second names, by which the classes may read what a first one says."""
        for second, first in names.items():
            value = self.any(second)
            if value is not None and value != self.config.get(first):
                self.wrong(second, value, f"must equal {first} = {self.config.get(first)!r}")

    def wrong(self, name: str, value: Any, rule: str, instead: Any = None) -> Any:
        """Note a problem; returns a value to go on with, so that all problems are found."""
        self.problems.append(f"{name} = {value!r}"[:200] + f": {rule}")
        return instead

    def foreign(self) -> Iterator[str]:
        for name in COMPUTED_ELSEWHERE & self.config.keys() - self.read:
            if self.config[name] not in (None, False):
                yield (f"{name} = {self.config[name]!r}"[:200] + ": models of another model_type compute with it. If "
                       "this one does not, remove the entry")
