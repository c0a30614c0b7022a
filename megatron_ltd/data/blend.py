"""Several datasets as one, in given proportions: the same order as megatron-core's BlendedDataset.

Sample i comes from the dataset that is furthest behind its share, weight x i - samples drawn so far, the first of
equals. Nothing is random: each dataset is walked in its own (shuffled) order.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.corpus.index_cache import cached_arrays
from megatron_ltd.data.native import helpers
from megatron_ltd.data.sample import Dataset, Sample, check_index
from megatron_ltd.errors import ConfigError

SURPLUS = 0.005  # share of samples that a dataset is built for beyond its own
MOST_DATASETS = 32766  # the index holds dataset numbers as int16
_COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class BlendSource:
    """Corpora and their weights, as --data-path and the like give them; without weights each is read for one epoch."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(flag: str, values: Sequence[str]) -> BlendSource:
    """Reads PREFIX, several prefixes, or WEIGHT PREFIX pairs.

    An even number of values is taken as pairs if the first of each pair is a number.

    Raises:
        ConfigError: no value, some weights are missing, or a weight is no number above 0.
    """
    given = " ".join(values)
    if not values or not all(value.strip() for value in values):
        raise ConfigError(f"{flag} = {given!r}: give the prefix of a corpus, several, or WEIGHT PREFIX pairs.")
    numbers = [_number(value) for value in values[::2]] if len(values) % 2 == 0 else [None]
    if all(number is None for number in numbers):
        source = BlendSource(tuple(value.strip() for value in values), None)
    else:
        weights = [number for number in numbers if number is not None]
        if len(weights) < len(numbers):
            raise ConfigError(f"{flag} = {given}: some corpora have a weight and others do not. Give WEIGHT PREFIX for "
                              "each, or prefixes alone.")
        for weight in weights:
            if not math.isfinite(weight) or weight <= 0:
                raise ConfigError(f"{flag} = {given}: weight = {weight} must be a number above 0. Leave out a corpus "
                                  "that should not be read.")
        source = BlendSource(tuple(value.strip() for value in values[1::2]), tuple(weights))
    if len(source.prefixes) > MOST_DATASETS:
        raise ConfigError(f"{flag}: {len(source.prefixes)} corpora; at most {MOST_DATASETS} can be blended.")
    return source


def corpus_part(text: str) -> tuple[str, tuple[float, float] | None]:
    """The prefix of a corpus, and for PREFIX@BEGIN:END the part of it, from 0 to 1, that is read.

    Raises:
        ConfigError: it is no part.
    """
    found = re.fullmatch(r"(.+)@([^@:/]+):([^@:/]+)", text)
    if found is None:
        return text, None
    begin, end = _number(found[2]), _number(found[3])
    if begin is None or end is None or not 0 <= begin < end <= 1:
        raise ConfigError(f"{text}: the part after @ must be BEGIN:END with 0 <= BEGIN < END <= 1, such as 0:0.95.")
    return found[1], (begin, end)


def normalize(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    array = np.array(weights, dtype=np.float64)
    shares: list[float] = (array / np.sum(array)).tolist()
    return shares


def dataset_sizes(num_samples: int, weights: Sequence[float], surplus: float = 0.0) -> list[int]:
    """Samples that each dataset contributes to a blend of about `num_samples`; weights are normalised."""
    return [int(math.ceil(math.ceil(num_samples * weight) * (1 + surplus))) for weight in weights]


def build_blend_index(weights: Sequence[float], size: int, *,
                      native: bool = True) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """For each of `size` samples the number of its dataset, and its number in that dataset.

    Args:
        native: use the compiled loop if it is installed; the result is the same.
    """
    share = np.array(normalize(weights), dtype=np.float64)
    module = helpers() if native else None
    if module is not None:
        chosen, position = module.blend(share, size)
        return chosen, position
    drawn = np.zeros(len(share), dtype=np.float64)
    behind = np.empty_like(share)
    dataset_index = np.zeros(size, dtype=np.int16)
    for i in range(size):
        np.multiply(share, max(i, 1), out=behind)
        np.subtract(behind, drawn, out=behind)
        chosen = behind.argmax()
        drawn[chosen] += 1.0
        dataset_index[i] = chosen
    dataset_sample_index = np.empty(size, dtype=np.int64)
    for dataset in range(len(share)):
        positions = np.flatnonzero(dataset_index == dataset)
        dataset_sample_index[positions] = np.arange(len(positions))
    return dataset_index, dataset_sample_index


def counts(dataset_index: NDArray[np.int16], datasets: int) -> list[int]:
    """How often each dataset is chosen."""
    found = np.zeros(datasets, dtype=np.int64)
    for begin in range(0, len(dataset_index), _COUNTED_AT_ONCE):  # numpy makes an int64 copy of what it counts
        found += np.bincount(dataset_index[begin:begin + _COUNTED_AT_ONCE], minlength=datasets)
    return found.tolist()


class BlendIndex:
    """The index of a blend, from the cache if it was built before.

    Attributes:
        drawn: samples that the blend takes from each dataset.
    """

    def __init__(self, weights: Sequence[float], size: int, cache_path: str | None = None):
        self.weights, self.size = tuple(weights), size
        key = {"index": "blend", "weights": [float(weight).hex() for weight in weights], "size": size}
        self.dataset_index, self.dataset_sample_index = cached_arrays(
            cache_path, key, lambda: build_blend_index(weights, size))
        self.drawn = counts(self.dataset_index, len(weights))


class BlendedDataset:
    """Datasets read in the order of a blend; each holds at least the samples that the blend draws from it."""

    def __init__(self, datasets: Sequence[Dataset], index: BlendIndex):
        for number, (dataset, drawn) in enumerate(zip(datasets, index.drawn, strict=True)):
            if len(dataset) < drawn:
                raise ValueError(f"the blend draws {drawn} samples from dataset {number}, which holds {len(dataset)}")
        self.datasets, self.index = tuple(datasets), index
        parts = [str(index.size), *map(float.hex, map(float, index.weights)), *(dataset.digest for dataset in datasets)]
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self.index.size

    def sample(self, index: int) -> Sample:
        check_index(index, self)
        dataset = self.datasets[self.index.dataset_index.item(index)]
        return dataset.sample(self.index.dataset_sample_index.item(index))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
