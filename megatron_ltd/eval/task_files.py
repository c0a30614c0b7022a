"""Finding, reading and identifying task files: plain, .gz or .zst, never downloaded."""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zstandard

from megatron_ltd.errors import DataError

PACKED_SUFFIXES = ("", ".gz", ".zst")


@dataclass(frozen=True)
class TextLine:
    """The text of one line of a jsonl file, with the place to name in an error."""

    text: str
    place: str


def find_task_file(task: str, folder: Path, candidates: tuple[str, ...]) -> Path:
    """The first of `candidates` under `folder`, or lying directly in it, packed or not.

    Raises:
        DataError: none is there.
    """
    if not folder.is_dir():
        raise DataError(f"--task-data = {folder} is not a folder. Name the folder that holds the task files.")
    for candidate in candidates:
        for name in (candidate, Path(candidate).name):
            for suffix in PACKED_SUFFIXES:
                path = folder / (name + suffix)
                if path.is_file():
                    return path
    names = ", ".join(candidates)
    raise DataError(
        f"--task-data = {folder} holds no file for task {task}: looked for {names} (also .gz and .zst, also directly "
        f"in the folder). Put one of them there, or name a file: --tasks {task}=PATH."
    )


def plain_suffix(path: Path) -> str:
    """The suffix without .gz or .zst: `.jsonl` for `a.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOBase]:
    """The file as UTF-8 text, unpacked.

    Raises:
        DataError: missing, not readable, damaged, or not UTF-8; also while reading within the context.
    """
    try:
        with path.open("rb") as packed:
            if path.suffix == ".gz":
                yield io.TextIOWrapper(gzip.GzipFile(fileobj=packed), encoding="utf-8")
            elif path.suffix == ".zst":
                unpacked = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
                yield io.TextIOWrapper(io.BufferedReader(unpacked), encoding="utf-8")
            else:
                yield io.TextIOWrapper(packed, encoding="utf-8")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read: {error}. Check the path, or fetch the file again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Convert it to UTF-8.") from error


def read_text(path: Path) -> str:
    """The whole file."""
    with open_text(path) as lines:
        return lines.read()


def read_jsonl_texts(path: Path, limit: int | None = None) -> list[TextLine]:
    """The `text` of each line of a file of JSON objects, blank lines left out.

    Raises:
        DataError: a line is no JSON object with a string `text`, or there is no line at all.
    """
    found: list[TextLine] = []
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(found) == limit:
                break
            if line.strip():
                place = f"{path}:{number}"
                found.append(TextLine(_text_of(line, place), place))
    if not found:
        raise DataError(f'{path} has no examples. It needs one JSON object {{"text": ...}} a line.')
    return found


def _text_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{place} is not JSON: {error}. A line must be an object {{"text": ...}}.') from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'{place} has no string "text". A line must be an object {{"text": ...}}.')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: text holds half a surrogate pair: {error}. Mend or remove the line.") from error
    return record["text"]


def sha256_of(path: Path) -> str:
    """SHA-256 of the file as stored."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
