"""Tokenizes each word once: for tokenizers of the `tokenizers` library that always cut text at a space between words.

GPT-2's byte-level BPE begins a new piece at a single space between two visible ASCII characters, whatever is around
them, and so does BERT's WordPiece. What stands between two such spaces therefore has the same ids wherever it occurs,
and most of a text are words that occurred before.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.text.tokenizer import HuggingFaceEngine

FlatIds = tuple[NDArray[np.integer[Any]], NDArray[np.int64]]

_CUT = re.compile(r" (?<=[!-~] )(?=[!-~])")
_MOST_WORDS = 1 << 20
_ROOM = 1 << 16  # at first; doubled when it is used up


class RecurringWords:
    """A tokenizer of which `cut_at_spaces` holds, with a memory of the words it has seen."""

    def __init__(self, exact: HuggingFaceEngine):
        self.vocab_size, self.bos, self.adds_bos, self.pad = exact.vocab_size, exact.bos, exact.adds_bos, exact.pad
        self.digest, self.files, self.remark = exact.digest, exact.files, exact.remark
        self.encode, self.encode_batch, self.decode = exact.encode, exact.encode_batch, exact.decode
        self.token_to_id, self._exact = exact.token_to_id, exact
        self._forget()

    @property
    def eod(self) -> int:
        return self._exact.eod

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}
        self._used = 0
        self._ids = np.empty(_ROOM, dtype=np.int32)  # of all words, back to back, and room for more
        self._begins, self._lengths = np.empty((2, _ROOM), dtype=np.int64)

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """All ids back to back, and how many each text has."""
        if len(self._numbers) > _MOST_WORDS or self._used > 4 * _MOST_WORDS:
            self._forget()
        words: list[str] = []
        firsts = []
        for text in texts:
            firsts.append(len(words))
            first, *others = _CUT.split(text)
            words.append(f" {first}")  # no other word begins with a space
            words += others
        known = dict.fromkeys(words, 0)  # the words of these texts alone, so that it stays in the processor's cache
        self._learn([word for word in known if word not in self._numbers])
        for word in known:
            known[word] = self._numbers[word]
        numbers = np.fromiter(map(known.__getitem__, words), dtype=np.int64, count=len(words))
        lengths = self._lengths[numbers]
        shifts = self._begins[numbers] - np.cumsum(lengths) + lengths
        ids = self._ids[np.repeat(shifts, lengths) + np.arange(lengths.sum())]
        return ids, np.add.reduceat(lengths, firsts) if firsts else np.empty(0, dtype=np.int64)

    def _learn(self, words: list[str]) -> None:
        rows = self.encode_batch([word[1:] if word.startswith(" ") else f" {word}" for word in words])
        first, last = len(self._numbers), len(self._numbers) + len(words)
        self._numbers.update(zip(words, range(first, last), strict=True))
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ends = self._used + np.cumsum(lengths)
        used = self._used + int(lengths.sum())
        self._lengths, self._begins = _with_room(self._lengths, last), _with_room(self._begins, last)
        self._ids = _with_room(self._ids, used)
        self._lengths[first:last], self._begins[first:last] = lengths, ends - lengths
        self._ids[self._used:used] = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32,
                                                 count=used - self._used)
        self._used = used


def _with_room(values: NDArray[Any], size: int) -> NDArray[Any]:
    """The same values in an array of at least this size."""
    if size <= len(values):
        return values
    larger = np.empty(max(size, 2 * len(values)), dtype=values.dtype)
    larger[:len(values)] = values
    return larger


def cut_at_spaces(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer always cuts text before a space between two visible ASCII characters."""
    if any(token[flag] for token in settings["added_tokens"] for flag in ("single_word", "lstrip", "rstrip")) \
            or any(" " in token["content"] for token in settings["added_tokens"]):
        return False
    normalizer, before, model = settings["normalizer"], settings["pre_tokenizer"], settings["model"]
    if before is None or model.get("dropout"):
        return False
    if before["type"] == "ByteLevel":
        return normalizer is None and before.get("use_regex", True) and not before["add_prefix_space"]
    return before["type"] == "BertPreTokenizer" and normalizer is not None and normalizer["type"] == "BertNormalizer"
