"""Held-out sets as a run scores them: in whole global batches, and with a loss for each set that has a name."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

import numpy as np

from megatron_ltd.data.sample import Dataset, Sample, check_index


class NamedSets:
    """Validation sets with a loss each; as one dataset, they stand one after the other.

    Args:
        sets: in the order in which they are scored.
    """

    def __init__(self, sets: Mapping[str, Dataset]):
        self.sets = dict(sets)
        self._starts = [0, *accumulate(len(dataset) for dataset in self.sets.values())]
        parts = [f"{name} {dataset.digest}" for name, dataset in self.sets.items()]
        self.digest = hashlib.sha256("\n".join(["named sets", *parts]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def sample(self, index: int) -> Sample:
        check_index(index, self)
        number = bisect_right(self._starts, index) - 1
        return list(self.sets.values())[number].sample(index - self._starts[number])


class FilledDataset:
    """The samples of a set, then copies of its first one without any loss, to fill the last batch.

    Args:
        num_samples: at least those of the set.
    """

    def __init__(self, base: Dataset, num_samples: int):
        self.base, self._num_samples = base, num_samples
        self.digest = hashlib.sha256(f"filled {base.digest} {num_samples}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._num_samples

    def sample(self, index: int) -> Sample:
        check_index(index, self)
        if index < len(self.base):
            return self.base.sample(index)
        sample = self.base.sample(0)
        return {**sample, "loss_mask": np.zeros_like(sample["loss_mask"])}


def named_sets(dataset: Dataset | None) -> dict[str, Dataset]:
    """The sets that have a loss each, by name; a set without a name is called "", and there is none for None."""
    if isinstance(dataset, NamedSets):
        return dataset.sets
    return {} if dataset is None else {"": dataset}


def together(sets: Mapping[str, Dataset]) -> Dataset | None:
    """The inverse of `named_sets`."""
    return sets.get("") or (NamedSets(sets) if sets else None)


def in_whole_batches(dataset: Dataset | None, batch_samples: int) -> Dataset | None:
    """A held-out set filled up to whole global batches, each named set by itself."""
    return together({name: FilledDataset(part, -(-len(part) // batch_samples) * batch_samples)
                     for name, part in named_sets(dataset).items()})
