"""The documents in a block of loose JSON, an object a line, or in a file that is one document."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_ltd.data.preprocess.text_input import LARGEST_DOCUMENT_BYTES, Block

_EXCERPT_BYTES = 80


@dataclass(frozen=True)
class BadLine:
    """A line that holds no document.

    Attributes:
        first_byte: where it begins in the (decompressed) file.
        data: the line without its newline, or all of a file that was to be one document.
    """

    path: str
    line: int
    first_byte: int
    problem: str
    data: bytes

    def __str__(self) -> str:
        excerpt = self.data[:_EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")
        end = "..." if len(self.data) > _EXCERPT_BYTES else "."
        return f"{self.path}:{self.line}:{self.first_byte}: {self.problem}: {excerpt!r}{end}"


def sorted_documents(block: Block, json_keys: Sequence[str],
                     most_bad: int | None = None) -> tuple[list[list[str]], list[BadLine]]:
    """The texts of a block's good lines, for each key, and its bad lines.

    Args:
        most_bad: stop at this many bad lines.
    """
    texts: list[list[str]] = [[] for _ in json_keys]
    bad: list[BadLine] = []
    first_byte = block.first_byte
    for number, (line, found) in enumerate(_rows(block, json_keys) if block.columns is not None else
                                           _lines(block, json_keys)):
        if isinstance(found, str):
            bad.append(BadLine(block.path, block.first_line + number, first_byte, found, line))
            if len(bad) == most_bad:
                break
        else:
            for text, column in zip(found, texts, strict=True):
                column.append(text)
        if block.columns is None:  # a row has no place in bytes
            first_byte += len(line) + 1
    return texts, bad


def _lines(block: Block, json_keys: Sequence[str]) -> Iterator[tuple[bytes, Sequence[str] | str]]:
    """Each line, or the whole file, with its text under each key or what is wrong with it."""
    if block.whole:
        yield block.data, _whole(block.data, json_keys)
        return
    loads = _fast_parser()
    for line in block.lines():
        yield line, loads and _texts_of_plain(line, json_keys, loads) or _texts(line, json_keys)


def _rows(block: Block, json_keys: Sequence[str]) -> Iterator[tuple[bytes, Sequence[str] | str]]:
    """The same for the rows of a table; only a bad row is shown, as an object of JSON."""
    assert block.columns is not None
    for row in zip(*block.columns, strict=True):
        problem = next(filter(None, map(_problem, json_keys, row)), None)
        if problem is None:
            yield b"", [str(text) for text in row]
        else:
            shown = json.dumps(dict(zip(json_keys, row, strict=True)), ensure_ascii=False, default=repr)
            yield shown.encode(errors="backslashreplace"), problem


def _problem(key: str, text: object) -> str | None:
    """What is wrong with a value of a table."""
    if isinstance(text, bytes):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"not UTF-8: {error.reason} at byte {error.start} under key {key!r}"
    if not isinstance(text, str):
        return f"{type(text).__name__} under key {key!r}; it must hold a string (--json-keys)"
    if len(text) > LARGEST_DOCUMENT_BYTES // 4 and len(text.encode()) > LARGEST_DOCUMENT_BYTES:
        return f"more than {LARGEST_DOCUMENT_BYTES} bytes under key {key!r}; split the document"
    return None


def _whole(data: bytes, json_keys: Sequence[str]) -> list[str] | str:
    """The document that a file is, or what is wrong with it."""
    try:
        return [data.decode("utf-8")] * len(json_keys)
    except UnicodeDecodeError as error:
        return _not_utf8(error)


@cache
def _fast_parser() -> Callable[[bytes], Any] | None:
    """orjson, where it is installed (extra [fast])."""
    if importlib.util.find_spec("orjson") is None:
        return None
    import orjson

    loads: Callable[[bytes], Any] = orjson.loads
    return loads


def _texts_of_plain(line: bytes, json_keys: Sequence[str], loads: Callable[[bytes], Any]) -> list[str] | None:
    """The text under each key; None where the standard library has to decide.

    What orjson takes, that takes too, to the same strings; orjson refuses more, such as NaN and halves of surrogate
    pairs.
    """
    try:
        document = loads(line)
        texts = [document[key] for key in json_keys]
    except (ValueError, TypeError, LookupError):
        return None
    return texts if all(isinstance(text, str) for text in texts) else None


def _texts(line: bytes, json_keys: Sequence[str]) -> list[str] | str:
    """The text of a line under each key, or what is wrong with it."""
    if not line.strip():
        return "a blank line"
    document = json_object(line)
    if isinstance(document, str):
        return document
    problem = next((found for key in json_keys if (found := text_problem(document, key, line)) is not None), None)
    return problem if problem is not None else [document[key] for key in json_keys]


def json_object(line: bytes) -> dict[str, Any] | str:
    """The object that a line is, or what is wrong with it."""
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        return f"no JSON object: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless brackets
        return f"no JSON object that can be read: {error}"
    if not isinstance(document, dict):
        return f"a JSON {type(document).__name__}, not an object"
    return document


def text_problem(document: dict[str, Any], key: str, line: bytes) -> str | None:
    """Why there is no text under a key of the object that a line is."""
    text = document.get(key)
    if not isinstance(text, str):
        found = f"{type(text).__name__} under" if key in document else "no"
        return f"{found} key {key!r}; it must hold a string (--json-keys)"
    if not text.isascii() and b"\\u" in line:  # the line is UTF-8: only an escape can give half of a pair
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"key {key!r} holds half of a surrogate pair ({text[error.start]!a})"
    return None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: {error.reason} at byte {error.start} of the line"
