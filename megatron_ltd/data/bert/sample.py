"""Turns consecutive sentences into a BERT sample: two segments, in order or swapped, masked and padded."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.bert.masking import Masker, MaskingSettings
from megatron_ltd.data.sample import Sample
from megatron_ltd.data.text.wordpiece import MaskedVocabulary

SPECIAL_TOKENS = 3  # [CLS] and, after each segment, [SEP]
LEAST_TOKENS = SPECIAL_TOKENS + 2


@dataclass(frozen=True, eq=False)
class BertSampleForm:
    """How a BERT sample is made of sentences.

    Attributes:
        seq_length: tokens of a sample, special ones and padding included.
        predictions: places for predicted tokens in a sample, at least mask_prob x (seq_length - 3).
        binary_head: two segments whose order is to be told; otherwise one segment.
        short_seq_prob: share of samples that are shorter on purpose.
    """

    seq_length: int
    predictions: int
    vocabulary: MaskedVocabulary
    masking: MaskingSettings = MaskingSettings()
    binary_head: bool = True
    short_seq_prob: float = 0.1

    def __post_init__(self) -> None:
        if self.seq_length < LEAST_TOKENS:
            raise ValueError(f"seq_length = {self.seq_length} leaves no room for text")
        if self.predictions < max(1, int(self.masking.mask_prob * self.longest)):
            raise ValueError(f"predictions = {self.predictions} are too few for mask_prob = {self.masking.mask_prob}")

    @cached_property
    def _masker(self) -> Masker:
        return Masker(self.masking, self.vocabulary)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def longest(self) -> int:
        """Tokens of a sample without special ones."""
        return self.seq_length - SPECIAL_TOKENS

    @property
    def least_sentences(self) -> int:
        return 2 if self.binary_head else 1

    def key(self) -> dict[str, Any]:
        """All that decides samples, but for the vocabulary's tokens."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                  if field.name not in ("vocabulary", "masking")}
        ids = {name: getattr(self.vocabulary, name) for name in ("size", "pad", "cls", "sep", "mask")}
        return {**values, **dataclasses.asdict(self.masking), "ids": ids}

    def segments(self, text: NDArray[np.int64], lengths: NDArray[np.int32], target_tokens: int,
                 random: np.random.RandomState) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        """Both segments, no longer together than the target, and whether they are swapped.

        Args:
            text: the tokens of all sentences.
            lengths: tokens of each sentence.
        """
        if not self.binary_head:
            cut, swapped = len(text), False
        else:
            pivot = random.randint(low=1, high=len(lengths)) if len(lengths) >= 3 else 1
            cut, swapped = int(lengths[:pivot].sum()), bool(random.random_sample() < 0.5)
        first, second = text[:cut], text[cut:]
        if swapped:
            first, second = second, first
        spans = [[0, len(first)], [0, len(second)]]
        surplus = max(0, len(text) - target_tokens)
        for draw in random.random_sample(surplus).tolist():
            longer = spans[0] if spans[0][1] - spans[0][0] > spans[1][1] - spans[1][0] else spans[1]
            if draw < 0.5:
                longer[0] += 1
            else:
                longer[1] -= 1
        return first[slice(*spans[0])], second[slice(*spans[1])], swapped

    def arrays(self, text: NDArray[np.int64], lengths: NDArray[np.int32], target_tokens: int,
               random: np.random.RandomState) -> Sample:
        """The sample of some sentences.

        Shapes:
            s = seq_length, p = predictions -> tokens [s] int64, masked; padding_mask [s] bool, True for real tokens;
            predicted_positions [p] int64, ascending, then 0; labels [p] int64, the tokens that stood there;
            loss_mask [p] float32, 0 where there is no prediction; with the binary head token_types [s] int64, 1 in
            the second segment, and sentence_order [] int64, 1 if the segments are swapped.
        """
        first, second, swapped = self.segments(text, lengths, target_tokens, random)
        cls, sep = [self.vocabulary.cls], [self.vocabulary.sep]
        parts = (cls, first, sep, second, sep) if len(second) else (cls, first, sep)
        original = np.concatenate(parts, dtype=np.int64)
        masked, positions = self._masker.mask(original, target_tokens, random)
        length, count = len(original), len(positions)
        tokens = np.full(self.seq_length, self.vocabulary.pad, dtype=np.int64)
        tokens[:length] = masked
        predicted_positions, labels = np.zeros((2, self.predictions), dtype=np.int64)
        predicted_positions[:count], labels[:count] = positions, original[positions]
        sample: Sample = {
            "tokens": tokens, "padding_mask": np.arange(self.seq_length) < length,
            "predicted_positions": predicted_positions, "labels": labels,
            "loss_mask": (np.arange(self.predictions) < count).astype(np.float32)}
        if self.binary_head:
            types = np.zeros(self.seq_length, dtype=np.int64)
            types[len(first) + 2:length] = 1
            sample["token_types"] = types
            sample["sentence_order"] = np.array(swapped, dtype=np.int64)
        return sample
