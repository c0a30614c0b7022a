"""Finding, reading and identifying task files: plain, .gz or .zst, never downloaded."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ltd.data.preprocess.text_input import TextInput
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


def read_text(path: Path) -> str:
    """The whole file, unpacked.

    Raises:
        DataError: it is missing, damaged, or not UTF-8.
    """
    data = b"".join(block.data for block in TextInput(_existing(path)).blocks())
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Convert it to UTF-8.") from error


def read_jsonl_texts(path: Path, limit: int | None = None) -> list[TextLine]:
    """The `text` of each line of a file of JSON objects, blank lines left out.

    Raises:
        DataError: a line is no JSON object with a string `text`, or there is no line at all.
    """
    found: list[TextLine] = []
    for block in TextInput(_existing(path)).blocks():
        for number, line in enumerate(block.lines(), start=block.first_line):
            if limit is not None and len(found) == limit:
                return found
            if line.strip():
                place = f"{path}:{number}"
                found.append(TextLine(_text_of(line, place), place))
    if not found:
        raise DataError(f'{path} has no examples. It needs one JSON object {{"text": ...}} a line.')
    return found


def _existing(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path.")
    return str(path)


def _text_of(line: bytes, place: str) -> str:
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
