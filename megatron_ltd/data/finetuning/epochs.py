"""A training set read for whole epochs, each in its own order, and a held-out set filled up to whole batches."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.sample import Dataset, Sample

_KEPT_ORDERS = 2  # of the epoch that is read and, ahead of it, the next


class EpochDataset:
    """Sample i is a sample of epoch i // len(base), whose order is a function of the seed and its number.

    Args:
        base: one epoch.
        num_samples: of all epochs together.
    """

    def __init__(self, base: Dataset, num_samples: int, seed: int):
        self.base, self._num_samples, self._seed = base, num_samples, seed
        self.digest = hashlib.sha256(f"epochs {base.digest} {num_samples} {seed}".encode()).hexdigest()
        self._order = lru_cache(maxsize=_KEPT_ORDERS)(self._draw)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.base[self._place(index)]

    def sample(self, index: int) -> Sample:
        return self.base.sample(self._place(index))

    def _place(self, index: int) -> int:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        epoch, place = divmod(index, len(self.base))
        return int(self._order(epoch)[place])

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.base))


class FilledDataset:
    """The samples of a set, and after them as many that count for nothing as whole batches need.

    Args:
        num_samples: at least those of the set.
    """

    def __init__(self, base: Dataset, num_samples: int):
        self.base, self._num_samples = base, num_samples
        self.digest = hashlib.sha256(f"filled {base.digest} {num_samples}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.base[self._place(index)]

    def sample(self, index: int) -> Sample:
        sample = self.base.sample(self._place(index))
        if index < len(self.base):
            return sample
        return {**sample, "loss_mask": np.zeros_like(sample["loss_mask"])}

    def _place(self, index: int) -> int:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        return index if index < len(self.base) else 0
