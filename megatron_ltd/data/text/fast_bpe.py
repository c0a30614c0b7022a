"""Byte-level BPE in the `gigatoken` library (extra [fast]): the ids of the `tokenizers` library, many times faster.

The two use different versions of Unicode, so they disagree about characters that are unassigned in one of them
("\\u088f's" is split differently). Python's own tables are older than both, so a text with a character that is
unassigned there goes to `tokenizers`; around every other character the two were found equal. Texts that are hard to
split are compared whenever a tokenizer is built.
"""

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from megatron_ltd.data.text.recurring_words import FlatIds, RecurringWords, cut_at_spaces
from megatron_ltd.data.text.tokenizer import HuggingFaceEngine, Tokenizer
from megatron_ltd.errors import ConfigError

Engine = Literal["auto", "tokenizers", "gigatoken"]
ENGINES: tuple[Engine, ...] = ("auto", "tokenizers", "gigatoken")

_ASCII = bytes(range(128))
_SHORT_BYTES = 1000
_HARD_TEXTS = (
    "", "a", " ", "  \n\n\t x", "<|endoftext|>", "a<|endoftext|>b <|endoftext|> <|endoftext|>", "<|endoftext",
    "I'll we've 'S 's don'T 't 'RE", "１２３ ٣٤ x² ⅷ ½", "\u00a0\u2028\u3000a\u200bb", "é e\u0301 ́́́", "日本語テキスト",
    "🙂🙃👩‍👩‍👧's", "\0\x01\x7f\ufeffx", "a" * 3000, " " * 3000, "x\r\ny  z\n", "ﬁ İ ß ſ'ſ K",
    "\U0010ffff \ud7ff \ue000", "!!!???...---", "1234567890" * 30, "  leading", "trailing  ", "\t\ttab\n \n",
    "नमस्ते दुनिया", "ไทย", "שלום's", "a_b-c's", "</s><s>[PAD][MASK] <|pad|>")


class FastBpe:
    """A byte-level BPE tokenizer that can give ids as arrays.

    Args:
        exact: the tokenizer whose ids these are.

    Raises:
        ConfigError: the library is missing, cannot run this tokenizer, or gives other ids.
    """

    def __init__(self, exact: HuggingFaceEngine):
        if importlib.util.find_spec("gigatoken") is None:
            raise ConfigError("--tokenizer-engine gigatoken needs the package gigatoken. Install it: pip install "
                              "gigatoken; or use --tokenizer-engine tokenizers.")
        import gigatoken

        self.vocab_size, self.bos, self.adds_bos, self.pad = exact.vocab_size, exact.bos, exact.adds_bos, exact.pad
        self.digest, self.files, self.remark = exact.digest, exact.files, exact.remark
        self._exact = exact
        refused = f"--tokenizer-engine gigatoken cannot run the tokenizer in {', '.join(exact.files)}: "
        try:
            self._fast = gigatoken.Tokenizer.from_json(exact.definition)
        except Exception as error:  # the library raises nothing more precise
            reason = str(error).partition("\n")[0].rstrip(". ")
            raise ConfigError(f"{refused}{reason}. Use --tokenizer-engine tokenizers.") from error
        for text in _HARD_TEXTS:
            if self._fast.encode(text.encode()).tolist() != exact.encode(text):
                raise ConfigError(f"{refused}it gives other ids for {text[:40]!r}. Use --tokenizer-engine tokenizers.")

    @property
    def eod(self) -> int:
        return self._exact.eod

    def token_to_id(self, token: str) -> int | None:
        return self._exact.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._exact.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self._exact.decode(ids)

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """All ids back to back, and how many each text has."""
        data = [text.encode() for text in texts]
        unknown = [number for number, text in enumerate(data) if _has_unknown_character(text)]
        ids, lengths = self._of_short(data) if sum(map(len, data)) < _SHORT_BYTES * len(data) else self._of_long(data)
        if not unknown:
            return ids, lengths
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        for number in unknown:
            parts[number] = np.array(self._exact.encode(texts[number]), dtype=ids.dtype)
            lengths[number] = len(parts[number])
        return np.concatenate(parts), lengths

    def _of_long(self, data: list[bytes]) -> FlatIds:
        rows = [self._fast.encode(text) for text in data]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return np.concatenate(rows) if rows else np.empty(0, dtype=np.uint32), lengths

    def _of_short(self, data: list[bytes]) -> FlatIds:
        """One call for all, which pays off for short texts; its first one imports a large library, awkward."""
        rows = self._fast.encode_batch(data, parallel=False).layout
        offsets = np.asarray(rows.offsets.data, dtype=np.int64)
        return np.asarray(rows.content.data)[offsets[0]:offsets[-1]], np.diff(offsets)


def with_engine(tokenizer: Tokenizer, engine: Engine) -> tuple[Tokenizer, str | None]:
    """The tokenizer, run by the library of --tokenizer-engine.

    `auto` is gigatoken for GPT-2's byte-level BPE, where it is installed and gives the same ids.

    Returns:
        The tokenizer, and for `auto` why it is not the fast one, where that could be changed.

    Raises:
        ConfigError: gigatoken is asked for and cannot do it.
    """
    if engine == "gigatoken":
        if not isinstance(tokenizer, HuggingFaceEngine):
            raise ConfigError("--tokenizer-engine gigatoken runs byte-level BPE, such as GPT2BPETokenizer. Leave the "
                              "flag out.")
        return FastBpe(tokenizer), None
    if not isinstance(tokenizer, HuggingFaceEngine):
        return tokenizer, None
    remembering = RecurringWords(tokenizer) if cut_at_spaces(tokenizer.settings) else tokenizer
    if engine == "tokenizers" or not is_gpt2s(tokenizer.settings):
        return remembering, None
    if importlib.util.find_spec("gigatoken") is None:
        return remembering, "pip install gigatoken tokenizes many times faster, to the same ids."
    try:
        return FastBpe(tokenizer), None
    except ConfigError as error:
        return remembering, str(error)


def is_gpt2s(definition: dict[str, Any]) -> bool:
    """Whether text is cut as for GPT-2, for which the two libraries were compared around every character."""
    before, model = definition["pre_tokenizer"], definition["model"]
    plain = all(not token[flag] for token in definition["added_tokens"] for flag in ("single_word", "lstrip", "rstrip"))
    off = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
           "ignore_merges")
    return (definition["normalizer"] is None and before is not None and before["type"] == "ByteLevel"
            and before.get("use_regex", True) and not before["add_prefix_space"] and model["type"] == "BPE" and plain
            and not any(model.get(name) for name in off))


def _has_unknown_character(text: bytes) -> bool:
    if text.isascii():
        return False
    others = text.translate(None, _ASCII).decode()  # few, so that looking at each costs little
    return _unknown_characters().search(others) is not None


@cache
def _unknown_characters() -> re.Pattern[str]:
    """Characters that are unassigned in Python's tables, and planes 4 to 14, where nearly all are."""
    spans: list[list[int]] = [[0x40000, 0xEFFFF]]
    for code, category in enumerate(map(unicodedata.category, map(chr, range(0x40000)))):
        if category == "Cn":
            if spans[-1][1] == code - 1:
                spans[-1][1] = code
            else:
                spans.append([code, code])
    return re.compile("[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in spans) + "]")
