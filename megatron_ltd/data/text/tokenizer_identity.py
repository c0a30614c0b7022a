"""The files of a tokenizer, and a digest of what decides its ids, whichever flags and files it was loaded from."""

import hashlib
import json
import os
from typing import Any

from megatron_ltd.errors import DataError

_TABLES = ("vocab", "merges")
_OFFSETS = "trim_offsets"  # offsets of tokens in the text, which are not used


def library_digest(described: dict[str, Any]) -> str:
    """SHA-256 of the parts of a tokenizer of the `tokenizers` library that decide its ids.

    GPT-2's vocab.json with merges.txt and the tokenizer.json made of them have the same one. Padding, truncation, the
    decoder, tokens that would be put around a text, and settings that are off do not count.

    Args:
        described: what the library's `to_str` gives, read as JSON.
    """
    normalizer = described.get("normalizer")
    flags = ("id", "content", "single_word", "lstrip", "rstrip", *(("normalized",) if normalizer else ()))
    added = sorted([token.get(flag) for flag in flags] for token in described.get("added_tokens") or ())
    kept = {"added_tokens": added, "model": _bare(described["model"]), "normalizer": _bare(normalizer),
            "pre_tokenizer": _bare(described.get("pre_tokenizer"))}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _bare(setting: Any) -> Any:
    """A setting without what is off in it; tables of tokens as they are."""
    if isinstance(setting, list):
        return [_bare(value) for value in setting]
    if not isinstance(setting, dict):
        return setting
    return {name: value if name in _TABLES else _bare(value) for name, value in setting.items()
            if name != _OFFSETS and value is not None and value is not False and value != ""}


def readable(path: str, flag: str) -> str:
    """The path of a tokenizer's file.

    Raises:
        DataError: there is none.
    """
    if not os.path.isfile(path):
        place = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        raise DataError(f"{flag}: no file {path}{place}. Give {flag} the path of the file.")
    return path
