"""The documents in a block of loose JSON, an object a line, or in a file that is one document."""

import json
from collections.abc import Sequence

from megatron_ltd.data.text_input import Block
from megatron_ltd.errors import DataError

_EXCERPT_BYTES = 80


def documents(block: Block, json_keys: Sequence[str]) -> list[list[str]]:
    """The texts of a block, for each key.

    Raises:
        DataError: a line is no JSON object with a string under every key; it names file, line and byte.
    """
    if block.whole:
        return [[_decoded(block, 0, block.data)]] * len(json_keys)
    texts: list[list[str]] = [[] for _ in json_keys]
    for number, line in enumerate(block.lines()):
        if not line.strip():
            raise _bad_line(block, number, "a blank line")
        try:
            document = json.loads(_decoded(block, number, line))
        except json.JSONDecodeError as error:
            raise _bad_line(block, number, f"no JSON object: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless brackets
            raise _bad_line(block, number, f"no JSON object that can be read: {error}") from error
        if not isinstance(document, dict):
            raise _bad_line(block, number, f"a JSON {type(document).__name__}, not an object")
        for key, column in zip(json_keys, texts, strict=True):
            text = document.get(key)
            if not isinstance(text, str):
                found = f"{type(text).__name__} under" if key in document else "no"
                raise _bad_line(block, number, f"{found} key {key!r}; it must hold a string (--json-keys)")
            column.append(_encodable(block, number, key, text))
    return texts


def _decoded(block: Block, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_line(block, number, f"not UTF-8: {error.reason} at byte {error.start} of the line") from error


def _encodable(block: Block, number: int, key: str, text: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _bad_line(block, number, f"key {key!r} holds half of a surrogate pair "
                                           f"({text[error.start]!a})") from error
    return text


def _bad_line(block: Block, number: int, problem: str) -> DataError:
    """The error for line `number` (from 0) of a block, with its place in the file."""
    line = block.data if block.whole else block.lines()[number]
    first_byte = block.first_byte if block.whole else block.first_byte + sum(
        len(earlier) + 1 for earlier in block.lines()[:number])
    excerpt = line[:_EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")
    end = "..." if len(line) > _EXCERPT_BYTES else "."
    return DataError(f"{block.path}:{block.first_line + number}:{first_byte}: {problem}: {excerpt!r}{end} Correct or "
                     "remove this line (file:line:byte) and run again; nothing was written.")
