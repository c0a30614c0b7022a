"""A training set read for whole epochs, each in its own order."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.sample import Dataset, Sample, check_index

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

    def place(self, index: int) -> int:
        """The index of a sample in the base."""
        check_index(index, self)
        epoch, place = divmod(index, len(self.base))
        return self._order(epoch).item(place)

    def sample(self, index: int) -> Sample:
        return self.base.sample(self.place(index))

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.base))
