"""The examples of a task file, record by record, with the place to name in an error.

    .jsonl   an object a line               .json   a list of objects, or an object a line
    .tsv     a header line, then a row a line      .zip   any number of these

All but .zip also packed as .gz or .zst.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.eval.tasks.task_files import plain_suffix, read_text

MEMBER_LIMIT_BYTES = 1 << 30
"""The largest file that is read out of an archive."""


@dataclass(frozen=True)
class Record:
    """One example of a file; reading a field that is not as it should be raises, naming the place.

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

    def text(self, *names: str) -> str:
        """The first of these fields that there is, which must be a string."""
        value = self.any(*names)
        if not isinstance(value, str):
            raise self.error(f"{self._named(names)} = {value!r} must be a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"{self._named(names)} holds half a surrogate pair: {error}") from error
        return value

    def texts(self, *names: str) -> list[str]:
        value = self.any(*names)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.error(f"{self._named(names)} = {value!r} must be a list of texts")
        return value

    def option(self, options: dict[Any, int], *names: str) -> int:
        """What a label stands for; numbers may be written as texts, booleans are 0 and 1."""
        value = self.any(*names)
        for key in (value, str(value)):
            if isinstance(key, str | int) and key in options:
                return options[key]
        raise self.error(f"{self._named(names)} = {value!r} must be one of {', '.join(map(repr, options))}")

    def any(self, *names: str) -> Any:
        for name in names:
            if self.has(name):
                return self.values[name]
        raise self.error(f"there is no {' or '.join(map(repr, names))}")

    def part(self, name: str) -> "Record":
        """A field that is itself an object."""
        value = self.any(name)
        if not isinstance(value, dict):
            raise self.error(f"{name} = {value!r} must be an object")
        return Record(value, f"{self.place}, {name}", self.group)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.place}: {problem}"[:500] + ". Mend or remove the example.")

    def _named(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if self.has(name)), names[0])


def numbered(count: int) -> dict[Any, int]:
    """Labels 0, 1, ... as numbers or texts."""
    return {key: index for index in range(count) for key in (index, str(index))}


def read_records(path: Path, limit: int | None = None) -> list[Record]:
    """The first `limit` records of a file; of an archive, the first of each file in it.

    Raises:
        DataError: the file is damaged, of another kind, or empty.
    """
    if path.suffix == ".zip":
        records = [record for name, text in _members(path)
                   for record in _parsed(f"{path}/{name}", name, text, limit)]
    else:
        records = list(_parsed(str(path), path.name, read_text(path), limit))
    if not records:
        raise DataError(f"{path} has no examples. Name the file of the task.")
    return records


def _members(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if PurePosixPath(info.filename).suffix not in (".jsonl", ".json", ".tsv"):
                    continue
                if info.file_size > MEMBER_LIMIT_BYTES:
                    raise DataError(f"{path}/{info.filename} unpacks to {info.file_size} bytes, more than "
                                    f"{MEMBER_LIMIT_BYTES}. Unpack it yourself, if it is what it should be.")
                yield info.filename, archive.read(info).decode()
    except (zipfile.BadZipFile, UnicodeDecodeError, OSError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path} is no zip archive of UTF-8 texts: {error}. Get it again.") from error


def _parsed(place: str, name: str, text: str, limit: int | None) -> Iterator[Record]:
    suffix = plain_suffix(Path(name))
    group = PurePosixPath(name).name.split(".")[0]
    if suffix == ".tsv":
        source = _table(place, text)
    elif suffix == ".json" and text.lstrip().startswith("["):
        source = _list(place, text)
    elif suffix in (".json", ".jsonl"):
        source = _lines(place, text)
    else:
        raise DataError(f"{place} has the suffix {suffix!r}. A task file is .jsonl, .json, .tsv or .zip, the first "
                        "three also with .gz or .zst.")
    for index, (where, values) in enumerate(source):
        if index == limit:
            return
        if not isinstance(values, dict):
            raise DataError(f"{where}: an example must be an object. Mend or remove it.")
        yield Record(values, where, group)


def _lines(place: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{place}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}:{number} is not JSON: {error}. A line must be an object.") from error


def _list(place: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}. It must be a list of objects.") from error
    for index, value in enumerate(values):
        yield f"{place}, entry {index + 1}", value


def _table(place: str, text: str) -> Iterator[tuple[str, Any]]:
    lines = text.rstrip("\n").split("\n")
    head = lines[0].rstrip("\r").split("\t")
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(head):
            raise DataError(f"{place}:{number} has {len(cells)} columns, its first line {len(head)}. Mend or remove "
                            "it.")
        yield f"{place}:{number}", dict(zip(head, cells, strict=True))
