"""Fill-in-the-middle (https://arxiv.org/abs/2207.14255): the middle of some documents is moved behind their ends, so
that a model learns to complete the text between two others.

    PSM    [prefix] text before [suffix] text after [middle] text between
    SPM    [prefix] [suffix] text after [middle] text before, text between         (variant 2 of section 3)

As in megatron-core's `GPTFIMDataset`, what a sample holds of a document is decoded, cut at two random characters and
encoded again. So ids change where a cut divides a token, and a character whose bytes the edge of the sample divides is
lost. A sample that has become longer is truncated, one that has become shorter is padded. Unlike there, the cuts are a
function of (seed, corpus, sample), not of the samples read before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, flag_name

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class FillInTheMiddle:
    """Rearranges the documents of samples.

    Args:
        rate: share of documents; with `split` also of the documents whose fragments are rearranged.
        spm_rate: share of the rearranged texts that are in the order SPM.
        prefix, middle, suffix, pad, eod: ids.
        split: id of the token between the fragments of a document, which are rearranged one by one.
        fragment_rate: share of fragments.
        no_prefix: texts that begin with this are left alone.
    """

    tokenizer: Tokenizer
    rate: float
    spm_rate: float
    prefix: int
    middle: int
    suffix: int
    pad: int
    eod: int
    split: int | None
    fragment_rate: float
    no_prefix: str | None

    @property
    def settings(self) -> list[int | float | str | None]:
        """All that decides what becomes of a text, besides the tokenizer."""
        return [self.rate, self.spm_rate, self.prefix, self.middle, self.suffix, self.pad, self.eod, self.split,
                self.fragment_rate, self.no_prefix]

    def rearranged(self, text: Tokens, random: np.random.RandomState) -> Tokens:
        """The text of a sample. Shapes: [s + 1] -> the same"""
        parts = [text[:0]]
        for document, end in _pieces(text, self.eod):
            parts += [self._document(document, random), end]
        moved = np.concatenate(parts)[:len(text)]
        return np.pad(moved, (0, len(text) - len(moved)), constant_values=self.pad)

    def _document(self, document: Tokens, random: np.random.RandomState) -> Tokens:
        if self.split is None or self.split not in document:
            return self._moved(document, self.rate, random)
        if random.random_sample() >= self.rate:
            return document
        parts: list[Tokens] = []
        for fragment, end in _pieces(document, self.split):
            parts += [self._moved(fragment, self.fragment_rate, random), end]
        return np.concatenate([document[:0], *parts])

    def _moved(self, tokens: Tokens, rate: float, random: np.random.RandomState) -> Tokens:
        if random.random_sample() >= rate:
            return tokens
        text = self.tokenizer.decode(tokens.tolist())
        if self.no_prefix is not None and text.startswith(self.no_prefix):
            return tokens
        first, second = sorted(random.randint(0, len(text) + 1, size=2).tolist())
        before, between, after = map(self.tokenizer.encode, (text[:first], text[first:second], text[second:]))
        if random.random_sample() < self.spm_rate:
            order = [self.prefix, self.suffix, *after, self.middle, *before, *between]
        else:
            order = [self.prefix, *before, self.suffix, *after, self.middle, *between]
        return np.array(order, dtype=np.int64)


def _pieces(tokens: Tokens, separator: int) -> Iterator[tuple[Tokens, Tokens]]:
    """The pieces that hold tokens, each with the separator that ends it, if one does."""
    start = 0
    for place in [*np.flatnonzero(tokens == separator).tolist(), len(tokens)]:
        if place > start:
            yield tokens[start:place], tokens[place:place + 1]
        start = place + 1


def fill_in_the_middle(data: DataConfig, tokenizer: Tokenizer) -> FillInTheMiddle | None:
    """What the settings ask for; None without --fim-data.

    Raises:
        ConfigError: a token's name is not one token of the tokenizer.
    """
    if not data.fim_data:
        return None

    def id_of(kind: str) -> int:
        name = getattr(data, f"fim_{kind}")
        ids = tokenizer.encode(name)
        if len(ids) != 1 or tokenizer.decode(ids) != name:  # letters that a tokenizer does not know may be left out
            raise ConfigError(f"{flag_name(f'fim_{kind}')} = {name}: not one token of the tokenizer; name a "
                              "special token that it has, or add this one to it")
        return ids[0]

    return FillInTheMiddle(
        tokenizer, data.fim_rate, data.fim_spm_rate, id_of("prefix_token"), id_of("middle_token"),
        id_of("suffix_token"), id_of("pad_token"), tokenizer.eod if data.fim_eod_token is None else id_of("eod_token"),
        None if data.fim_split_sample is None else id_of("split_sample"),
        data.fim_rate if data.fim_fragment_rate is None else data.fim_fragment_rate, data.fim_no_prefix)
