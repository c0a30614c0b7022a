"""Finding and reading task files, which are never downloaded.

    .jsonl   an object a line               .json   a list of objects, or an object a line
    .tsv     a header line, then a row a line      .zip   any number of these

All but .zip also packed as .gz or .zst.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from megatron_ltd.data.preprocess.text_input import TextInput
from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.tasks.records import Record

BOM = b"\xef\xbb\xbf"
PACKED_SUFFIXES = ("", ".gz", ".zst")
MEMBER_LIMIT_BYTES = 1 << 30
"""The largest file that is read out of an archive."""

Lines = Iterable[tuple[int, bytes]]
"""The lines of a file with their numbers from 1."""


def first_packed(candidates: Iterable[Path]) -> Path | None:
    """The first of these files that exists, packed or not."""
    paths = (path.with_name(path.name + suffix) for path in candidates for suffix in PACKED_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def find_task_file(task: str, folder: Path, candidates: tuple[str, ...]) -> Path:
    """The first of `candidates` under `folder` or directly in it, packed or not.

    Raises:
        DataError: there is none.
    """
    if not folder.is_dir():
        raise DataError(f"--task-data = {folder} is not a folder. Name the folder that holds the task files.")
    found = first_packed(folder / name for candidate in candidates for name in (candidate, Path(candidate).name))
    if found is None:
        raise DataError(
            f"--task-data = {folder} holds no file for task {task}: looked for {', '.join(candidates)} (also .gz and "
            f".zst, also directly in the folder). Put one of them there, or name a file: {task}=PATH."
        )
    return found


def plain_suffix(path: PurePath) -> str:
    """The suffix without .gz or .zst: `.jsonl` for `a.jsonl.gz`."""
    return PurePath(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def sha256_of(path: Path) -> str:
    """SHA-256 of the file as stored.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from error


def read_text(path: Path) -> tuple[str, tuple[str, ...]]:
    """The whole file, unpacked and with Unix line ends, and what had to be changed for it.

    Raises:
        DataError: it is missing, damaged, or not UTF-8.
    """
    data = b"".join(block.data for block in _open(path).blocks())
    notes = [(data.count(b"\r"), "line ends of {} lines read as Unix line ends"),
             (int(data.startswith(BOM)), "{} byte order mark at the beginning left out")]
    return _decoded(str(path), data), tuple(note.format(count) for count, note in notes if count)


def read_json_lines(path: Path, limit: int | None = None) -> list[Record]:
    """The first `limit` records of a file of JSON objects, one a line, whatever the file's suffix.

    Raises:
        DataError: a line is no JSON object, or there is no line at all.
    """
    return _first(_json_lines(str(path), _lines_of(path)), limit, path)


def read_records(path: Path, limit: int | None = None) -> list[Record]:
    """The first `limit` records of a file; of an archive, the first of each file in it.

    Raises:
        DataError: the file is damaged, of another kind, or empty.
    """
    if path.suffix != ".zip":
        return _first(_records(str(path), path, _lines_of(path)), limit, path)
    members = [islice(_records(f"{path}/{name}", name, lines), limit) for name, lines in _members(path)]
    return _first(chain.from_iterable(members), None, path)


def _first(records: Iterable[Record], limit: int | None, path: Path) -> list[Record]:
    found = list(islice(records, limit))
    if not found:
        raise DataError(f"{path} has no examples. Name the file of the task.")
    return found


def _lines_of(path: Path) -> Lines:
    return ((number, line) for block in _open(path).blocks()
            for number, line in enumerate(block.lines(), start=block.first_line))


def _open(path: Path) -> TextInput:
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path.")
    return TextInput(str(path))


def _members(path: Path) -> Iterator[tuple[PurePath, Lines]]:
    """The task files in an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                name = PurePosixPath(info.filename)
                if name.suffix not in (".jsonl", ".json", ".tsv") or name.name.startswith("._"):  # of macOS
                    continue
                if info.file_size > MEMBER_LIMIT_BYTES:
                    raise DataError(f"{path}/{name} unpacks to {info.file_size} bytes, more than "
                                    f"{MEMBER_LIMIT_BYTES}. Unpack it yourself, if it is what it should be.")
                yield name, enumerate(archive.read(info).split(b"\n"), start=1)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path} is not a readable zip archive: {error}. Get it again.") from error


def _records(place: str, name: PurePath, lines: Lines) -> Iterator[Record]:
    """The records of one file, as its suffix says."""
    suffix, group = plain_suffix(name), name.name.split(".")[0]
    if suffix == ".jsonl":
        return _json_lines(place, lines, group)
    if suffix not in (".json", ".tsv"):
        raise DataError(f"{place} has the suffix {suffix!r}. A task file is .jsonl, .json, .tsv or .zip, the first "
                        "three also with .gz or .zst.")
    data = b"\n".join(line for _, line in lines).removeprefix(BOM)
    if suffix == ".tsv":
        return _table(place, data, group)
    if data.lstrip().startswith(b"["):
        values = _from_json(place, data, "It must be a list of objects.")
        return (_record(value, f"{place}, entry {index}", group) for index, value in enumerate(values, start=1))
    return _json_lines(place, enumerate(data.split(b"\n"), start=1), group)


def _json_lines(place: str, lines: Lines, group: str = "") -> Iterator[Record]:
    for number, line in lines:
        if line.strip():
            here = f"{place}:{number}"
            yield _record(_from_json(here, line, "A line must be an object."), here, group)


def _table(place: str, data: bytes, group: str) -> Iterator[Record]:
    head, *rows = (line.split("\t") for line in _decoded(place, data).rstrip("\n").split("\n"))
    for number, cells in enumerate(rows, start=2):
        if len(cells) != len(head):
            raise DataError(f"{place}:{number} has {len(cells)} columns, its first line {len(head)}. Fix or remove it.")
        yield Record(dict(zip(head, cells, strict=True)), f"{place}:{number}", group)


def _record(value: Any, place: str, group: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: an example must be an object. Fix or remove it.")
    return Record(value, place, group)


def _from_json(place: str, data: bytes, wanted: str) -> Any:
    try:
        return json.loads(data.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}. {wanted}") from error


def _decoded(place: str, data: bytes) -> str:
    try:
        return data.removeprefix(BOM).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 text: {error}. Convert it to UTF-8.") from error
