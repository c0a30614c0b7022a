"""Long samples first, and then the parts of long samples."""

import hashlib
from typing import NamedTuple

from megatron_ltd.data.sample import Dataset, Sample, check_index


class LongSamples(NamedTuple):
    """The first samples of a run that are longer than the others.

    Args:
        samples: how many of them are read.
        parts: their length, as a multiple of the others'.
    """

    samples: int
    parts: int

    def needed(self, samples: int) -> int:
        """Long samples that hold the first `samples` samples of a run."""
        return min(samples, self.samples) + -(-max(0, samples - self.samples) // self.parts)


class PartedDataset:
    """The samples of a run with `--token-superposition-text more`, from one dataset of long samples.

    Sample i is long sample i while long ones are read. After that, each further long sample is read as K samples, its
    parts in order. So long samples are consecutive text, as in https://arxiv.org/abs/2605.06546, no text is read twice
    and none is left out; two datasets, one for each length, would each begin with a shuffle of the same documents. What
    an index means depends on the settings alone. The price: K consecutive samples of the second phase are neighbours in
    the text, and its order is not that of a run without superposition.

    Args:
        long: of samples of K x seq_length tokens.
    """

    def __init__(self, long: Dataset, first: LongSamples):
        self.long, self.first = long, first
        self.digest = hashlib.sha256(f"parts {first.samples} {first.parts} {long.digest}".encode()).hexdigest()

    def __len__(self) -> int:
        whole = min(self.first.samples, len(self.long))
        return whole + (len(self.long) - whole) * self.first.parts

    def sample(self, index: int) -> Sample:
        check_index(index, self)
        if index < self.first.samples:
            return self.long.sample(index)
        number, part = divmod(index - self.first.samples, self.first.parts)
        arrays = self.long.sample(self.first.samples + number)
        return {name: array.reshape(self.first.parts, -1)[part] for name, array in arrays.items()}
