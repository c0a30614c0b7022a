"""Which tokens of a BERT sample are predicted, and what stands in their place: as in megatron-core, draw for draw.

Words, or pieces of them, are visited in random order; at each one a row of 1 to max_ngram words is drawn and shortened
until it fits into what is left to predict. Of the predicted tokens 80% become [MASK], 10% a random id of the
vocabulary, 10% stay (https://arxiv.org/abs/1810.04805, section 3.1).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.text.wordpiece import MaskedVocabulary

_GEOMETRIC = 0.2
_BECOME_MASK = 0.8
_STAY = 0.5  # of the others


@dataclass(frozen=True)
class MaskingSettings:
    """The settings --mask-*, as `DataConfig` documents them."""

    mask_prob: float = 0.15
    max_ngram: int = 3
    whole_word: bool = True
    longer_ngrams: bool = False
    geometric: bool = False


class Masker:
    """Masks samples of one vocabulary."""

    def __init__(self, settings: MaskingSettings, vocabulary: MaskedVocabulary):
        self._settings, self._vocabulary = settings, vocabulary
        weights = 1.0 / np.arange(1, settings.max_ngram + 1)
        weights /= weights.sum(keepdims=True)
        if settings.longer_ngrams:
            weights = weights[::-1]
        self._up_to = (weights / weights.sum(keepdims=True)).cumsum()
        self._up_to /= self._up_to[-1]

    def mask(self, tokens: NDArray[np.int64], target_tokens: int,
             random: np.random.RandomState) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masks one sample.

        Args:
            target_tokens: the length that the sample was to have, without special tokens.

        Returns:
            The masked tokens, and the positions of those to predict, ascending; at most mask_prob x target_tokens.
        """
        positions, starts = self._candidates(tokens)
        words = len(starts) - 1
        share = self._settings.mask_prob
        budget = min(share * target_tokens, max(1, int(round(len(tokens) * share))))
        masked, taken = tokens.copy(), np.zeros(len(positions), dtype=np.bool_)
        count = 0
        order = np.arange(words)
        random.shuffle(order)
        for first in order.tolist():
            if count >= budget:
                break
            begin = starts[first]
            for length in range(self._ngram(random), 0, -1):
                end = starts[min(first + length, words)]
                if count + end - begin <= budget:
                    break
            else:
                continue
            if taken[begin:end].any():
                continue
            taken[begin:end] = True
            count += end - begin
            for position in positions[begin:end].tolist():
                self._replace(masked, position, random)
        return masked, positions[taken]

    def _candidates(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
        """Positions that may be predicted, and where among them each word begins, with an end."""
        vocabulary = self._vocabulary
        positions = np.flatnonzero((tokens != vocabulary.cls) & (tokens != vocabulary.sep))
        begins = np.ones(len(positions), dtype=np.bool_)
        if self._settings.whole_word:
            begins[1:] = ~vocabulary.continues_word[tokens[positions[1:]]]
        return positions, [*np.flatnonzero(begins).tolist(), len(positions)]

    def _ngram(self, random: np.random.RandomState) -> int:
        """How many words in a row to predict."""
        if self._settings.geometric:
            return min(int(random.geometric(_GEOMETRIC)), self._settings.max_ngram)
        return int(self._up_to.searchsorted(random.random_sample(), side="right")) + 1

    def _replace(self, masked: NDArray[np.int64], position: int, random: np.random.RandomState) -> None:
        if random.random_sample() < _BECOME_MASK:
            masked[position] = self._vocabulary.mask
        elif random.random_sample() >= _STAY:
            masked[position] = random.randint(0, self._vocabulary.size)
