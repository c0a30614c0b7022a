"""Which tokens make up GPT sample i: the same order as megatron-core's GPTDataset for the same arguments.

Three arrays, drawn from one `numpy.random.RandomState(seed)` in this order:

    document_index  the sequences of the corpus part, repeated for every epoch and shuffled: their concatenation is
                    one long stream of tokens
    sample_index    row n: (position in document_index, token in that document) where sample n of the stream begins;
                    samples begin every seq_length tokens and share one token with the next, for its label
    shuffle_index   sample i of the dataset is sample shuffle_index[i] of the stream

When the samples asked for use less than 80% of the last epoch, that epoch is shuffled by itself, so that its
documents are not over-represented early in the run.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.native import helpers
from megatron_ltd.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
_CHUNK_DOCUMENTS = 1 << 18
_LONG_DOCUMENTS = 1 << 12  # shorter arrays are shuffled as fast by numpy
LABEL_TOKENS = 1  # a sample reads one token beyond its length, the label of its last


class GPTIndex(NamedTuple):
    """The three arrays of the module's docstring."""

    document_index: NDArray[np.int32]
    sample_index: NDArray[Any]
    shuffle_index: NDArray[Any]


def split_bounds(split: str) -> tuple[tuple[float, float] | None, ...]:
    """Turns --split into the share of the corpus, as [from, to), of training, validation and test; None for no share.

    Raises:
        ConfigError: not one to three numbers >= 0, not all zero.
    """
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(np.isfinite(shares)) or min(shares) < 0 or sum(shares) == 0:
        raise ConfigError(f"--split = {split}: give up to three numbers >= 0 between commas, the shares of training, "
                          "validation and test, such as 969,30,1.")
    shares += [0.0] * (3 - len(shares))
    widths = (np.array(shares) / np.sum(shares)).tolist()
    edges = [0.0]
    for width in widths:
        edges.append(edges[-1] + width)
    return tuple((low, high) if high > low else None for low, high in zip(edges[:-1], edges[1:], strict=True))


def split_range(bounds: tuple[float, float], sequences: int) -> range:
    """The sequences that belong to a split, of a corpus with this many."""
    low, high = bounds
    return range(int(round(low * float(sequences))), int(round(high * float(sequences))))


def build_gpt_index(sequence_lengths: NDArray[np.int32], sequences: range, num_samples: int | None, seq_length: int,
                    seed: int) -> GPTIndex:
    """Builds the index of a part of a corpus.

    Args:
        sequence_lengths: tokens of every sequence of the corpus.
        sequences: the part to sample from.
        num_samples: the least number of samples, from as many epochs as that takes; None: one epoch.

    Raises:
        DataError: the part has no tokens, or more than 2^31 - 1 sequences.
    """
    if sequences.stop > np.iinfo(np.int32).max:
        raise DataError(f"A corpus of {len(sequence_lengths)} sequences: the index holds at most 2^31 - 1. Split the "
                        "corpus.")
    epoch_tokens = int(sequence_lengths[sequences.start:sequences.stop].sum(dtype=np.int64))
    if epoch_tokens == 0:
        raise DataError(f"No tokens to sample from: sequences {sequences.start} to {sequences.stop} of "
                        f"{len(sequence_lengths)} hold 0 tokens.")
    epochs = 1
    if num_samples is not None:
        epochs = max(1, -(-(num_samples * seq_length + LABEL_TOKENS) // epoch_tokens))
    total_samples = (epochs * epoch_tokens - LABEL_TOKENS) // seq_length
    before_last = total_samples  # samples that are shuffled together
    if epochs > 1 and num_samples is not None:
        earlier = ((epochs - 1) * epoch_tokens - LABEL_TOKENS) // seq_length
        if num_samples - earlier < int(0.80 * ((epoch_tokens - LABEL_TOKENS) // seq_length)):
            before_last = earlier
    random = np.random.RandomState(seed)
    document_index = _document_index(sequences, epochs, before_last < total_samples, random)
    return GPTIndex(document_index, _sample_index(sequence_lengths, document_index, total_samples, seq_length),
                    _shuffle_index(before_last, total_samples, random))


def _document_index(sequences: range, epochs: int, last_apart: bool,
                    random: np.random.RandomState) -> NDArray[np.int32]:
    epoch = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    index = epoch if epochs == 1 else np.tile(epoch, epochs)
    together = len(index) - len(sequences) if last_apart else len(index)
    shuffle(index[:together], random)
    if last_apart:
        shuffle(index[together:], random)
    return index


def shuffle(values: NDArray[np.int32], random: np.random.RandomState, *, native: bool = True) -> None:
    """`random.shuffle(values)`, in the compiled loop if it is installed: the same order and the same state after it."""
    kind, key, position, *gauss = random.get_state(legacy=True)
    module = helpers() if native and _LONG_DOCUMENTS <= len(values) < 1 << 32 else None
    if module is None:
        random.shuffle(values)
        return
    key = np.array(key, dtype=np.uint32)
    position = module.shuffle(values, key, position)
    random.set_state((kind, key, position, *gauss))


def _sample_index(sequence_lengths: NDArray[np.int32], document_index: NDArray[np.int32], samples: int,
                  seq_length: int) -> NDArray[Any]:
    """Where samples begin in the concatenation of the documents, int32 [samples + 1, 2].

    A position that falls between two documents belongs to the one that holds the token there.
    """
    large = len(document_index) > np.iinfo(np.int32).max
    index = np.empty((samples + 1, 2), dtype=np.int64 if large else np.int32)
    row = tokens = 0  # before the documents of this round
    for begin in range(0, len(document_index), _CHUNK_DOCUMENTS):
        lengths = sequence_lengths[document_index[begin:begin + _CHUNK_DOCUMENTS]]
        ends = np.cumsum(lengths, dtype=np.int64)
        end_row = min(samples, (tokens + int(ends[-1]) - 1) // seq_length) + 1
        starts = np.arange(row, end_row, dtype=np.int64) * seq_length - tokens
        document = np.searchsorted(ends, starts, side="right")
        index[row:end_row, 0] = document + begin
        index[row:end_row, 1] = starts - (ends[document] - lengths[document])
        row, tokens = end_row, tokens + int(ends[-1])
    index[0] = 0
    return index


def _shuffle_index(before_last: int, samples: int, random: np.random.RandomState) -> NDArray[Any]:
    index = np.arange(samples, dtype=np.uint32 if samples < np.iinfo(np.uint32).max - 1 else np.int64)
    parts = (index[:before_last], index[before_last:]) if before_last < samples else (index[:before_last],)
    for part in parts:
        if part.dtype == np.uint32:
            shuffle(part.view(np.int32), random)
        else:
            random.shuffle(part)
    return index
