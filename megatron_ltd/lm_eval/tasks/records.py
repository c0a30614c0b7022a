"""One example of a task file, whose fields are checked as they are read."""

from dataclasses import dataclass
from typing import Any

from megatron_ltd.errors import DataError


@dataclass(frozen=True)
class Record:
    """One example; reading a field that is missing or malformed raises a `DataError` that names the place.

    Where a method takes several names, they are alternatives: layouts of one task differ in what they call a field.

    Args:
        values: its fields.
        place: file and line, or entry.
        group: the name of its file without suffixes, for tasks of several files.
    """

    values: dict[str, Any]
    place: str
    group: str = ""

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def any(self, *names: str) -> Any:
        return self.values[self._present(names)]

    def text(self, *names: str) -> str:
        name = self._present(names)
        return self._checked(name, self.values[name], "a text")

    def texts(self, *names: str) -> list[str]:
        name = self._present(names)
        values = self.values[name]
        if not isinstance(values, list) or not values:
            raise self.error(f"{name} = {values!r} must be a list of texts")
        return [self._checked(name, value, "a list of texts") for value in values]

    def filled(self, template: str) -> str:
        """The template with texts in place of their names: `{name}`, or `{name|other}` for the first there is."""
        return template.format_map(self)

    def __getitem__(self, names: str) -> str:
        return self.text(*names.split("|"))

    def option(self, options: dict[Any, int], *names: str) -> int:
        """What a label stands for; numbers may be written as texts, booleans are 0 and 1."""
        name = self._present(names)
        value = self.values[name]
        for key in (value, str(value)):
            if isinstance(key, str | int) and key in options:
                return options[key]
        raise self.error(f"{name} = {value!r} must be one of {', '.join(map(repr, options))}")

    def part(self, name: str) -> "Record":
        """A field that is itself an object."""
        value = self.any(name)
        if not isinstance(value, dict):
            raise self.error(f"{name} = {value!r} must be an object")
        return Record(value, f"{self.place}, {name}", self.group)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.place}: {problem}"[:500] + ". Fix or remove the example.")

    def _checked(self, name: str, value: Any, kind: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{name} = {self.values[name]!r} must be {kind}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"{name} holds half a surrogate pair: {error}") from error
        return value

    def _present(self, names: tuple[str, ...]) -> str:
        for name in names:
            if self.has(name):
                return name
        raise self.error(f"there is no {' or '.join(map(repr, names))}")


def numbered(count: int) -> dict[Any, int]:
    """Labels 0, 1, ... as numbers or texts."""
    return {key: index for index in range(count) for key in (index, str(index))}
