"""Which sentences make up BERT sample i: the same mapping as megatron-core's for the same arguments.

A document is cut into runs of consecutive sentences, each as long as a target length, or longer by a part of its last
sentence; what is left at the end of the document is a run too. Targets are the longest length, or with probability
short_seq_prob (rounded to 1 in n) any smaller one, drawn from mt19937(seed). Documents with a sentence of more than 512
tokens are left out, as are those with fewer sentences than a sample needs. Epochs follow each other until there are
enough samples; then all rows are shuffled with mt19937_64(seed + 1).
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.native import helpers
from megatron_ltd.errors import DataError

LONGEST_SENTENCE_TOKENS = 512
_DRAWS = 1 << 16
_WORDS, _MIDDLE = 312, 156  # of mt19937_64


def build_mapping(document_indices: NDArray[np.int64], sequence_lengths: NDArray[np.int32], num_samples: int | None,
                  longest: int, short_seq_prob: float, seed: int, least_sentences: int, *,
                  native: bool = True) -> NDArray[Any]:
    """Builds the mapping of a part of a corpus.

    Args:
        document_indices: for each document of the part the number of its first sentence, and the end of the last.
        sequence_lengths: tokens of every sentence of the corpus.
        num_samples: the least number, from whole epochs; None: one epoch.
        longest: tokens of a sample without special ones, at least 2.
        least_sentences: sentences that a sample needs.
        native: use the compiled loop if it is installed; the result is the same.

    Returns:
        [samples, 3] uint32, uint64 from 2^32 sentences on: first sentence, end, target tokens.

    Raises:
        DataError: no document yields a sample.
    """
    if longest < 2:
        raise ValueError(f"longest = {longest} must be at least 2")
    if len(document_indices) and not 0 <= document_indices[0] <= document_indices[-1] <= len(sequence_lengths):
        raise ValueError("documents beyond the sentences")
    ratio = math.floor(1.0 / short_seq_prob + 0.5) if short_seq_prob > 0 else 0
    large = len(sequence_lengths) > np.iinfo(np.uint32).max
    wanted = 1 if num_samples is None else num_samples
    module = helpers() if native else None
    if module is not None:
        build = module.mapping_uint64 if large else module.mapping_uint32
        # A map of .idx is not aligned to its numbers, which compiled code may take for granted.
        bounds, lengths = (np.require(a, requirements="A") for a in (document_indices, sequence_lengths))
        rows: NDArray[Any] = build(bounds, lengths, wanted, longest, ratio, seed, least_sentences,
                                   LONGEST_SENTENCE_TOKENS)
    else:
        rows = _rows(document_indices, sequence_lengths, wanted, _targets(seed, ratio, longest), least_sentences)
        rows = rows.astype(np.uint64 if large else np.uint32)[_permutation(len(rows), seed + 1)]
    if not len(rows):
        raise DataError(
            f"None of {len(document_indices) - 1} documents yields a sample: each has fewer than {least_sentences} "
            f"sentences, or one of more than {LONGEST_SENTENCE_TOKENS} tokens. Write the corpus with "
            "tools/preprocess_data.py --split-sentences.")
    return rows


def _targets(seed: int, ratio: int, longest: int) -> Iterator[int]:
    """The target lengths, without end."""
    random = np.random.RandomState(seed)  # seeded as std::mt19937 is
    while True:
        if ratio == 0:
            yield longest
            continue
        draws = random.randint(0, 1 << 32, size=_DRAWS, dtype=np.uint32).astype(np.int64)
        yield from np.where(draws % ratio == 0, 2 + draws % (longest - 1), longest).tolist()


def _rows(document_indices: NDArray[np.int64], sequence_lengths: NDArray[np.int32], wanted: int,
          targets: Iterator[int], least: int) -> NDArray[np.int64]:
    """The mapping in the order of the corpus."""
    lengths: list[int] = sequence_lengths.tolist()
    bounds: list[int] = document_indices.tolist()
    documents = [(first, last) for first, last in itertools.pairwise(bounds) if last - first >= max(least, 1)
                 and (last - first == 1 or max(lengths[first:last]) <= LONGEST_SENTENCE_TOKENS)]
    rows: list[tuple[int, int, int]] = []
    while documents:
        for first, last in documents:
            start, tokens, target = first, 0, next(targets)
            for sentence in range(first, last):
                tokens += lengths[sentence]
                left = last - sentence - 1
                if left == 0 or (tokens >= target and left > 1 and sentence - start + 1 >= least):
                    rows.append((start, sentence + 1, target))
                    start, tokens, target = sentence + 1, 0, next(targets)
        if len(rows) >= wanted:
            break
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Fisher and Yates's shuffle from the end, of 0 ... count - 1, with mt19937_64."""
    order = list(range(count))
    draws = mt19937_64(seed)
    for i in range(count - 1, 0, -1):
        j = next(draws) % (i + 1)
        order[i], order[j] = order[j], order[i]
    return np.array(order, dtype=np.int64)


def mt19937_64(seed: int) -> Iterator[int]:
    """The numbers of std::mt19937_64 (Nishimura 2000)."""
    state = [seed & 0xFFFFFFFFFFFFFFFF]
    for i in range(1, _WORDS):
        state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) & 0xFFFFFFFFFFFFFFFF)
    while True:
        for i in range(_WORDS):
            mixed = (state[i] & 0xFFFFFFFF80000000) | (state[(i + 1) % _WORDS] & 0x7FFFFFFF)
            state[i] = state[(i + _MIDDLE) % _WORDS] ^ (mixed >> 1) ^ (0xB5026F5AA96619E9 if mixed & 1 else 0)
        for x in state:
            x ^= (x >> 29) & 0x5555555555555555
            x ^= (x << 17) & 0x71D67FFFEDA60000
            x ^= (x << 37) & 0xFFF7EEE000000000
            yield x ^ (x >> 43)
