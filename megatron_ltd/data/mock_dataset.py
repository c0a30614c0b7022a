"""Random tokens in place of a corpus, for throughput runs (--mock-data)."""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.bert.dataset import BertSampleForm
from megatron_ltd.data.sample import GPTSampleForm, Sample, check_index

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class MockDataset:
    """Tokens that are a function of (seed, split, sample index, position).

    Args:
        split: 0 for training, 1 for validation, 2 for test; they draw different tokens.
        num_samples: samples in the dataset.
    """

    def __init__(self, split: int, num_samples: int, seed: int, form: GPTSampleForm):
        self.form = form
        self._num_samples = num_samples
        self._start = _mix(np.array([seed], dtype=np.uint64) * np.uint64(3) + np.uint64(split))
        self.digest = hashlib.sha256(json.dumps(["mock", split, num_samples, seed, repr(form)]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._num_samples

    def text(self, index: int) -> NDArray[np.int64]:
        """The seq_length + 1 tokens of a sample."""
        check_index(index, self)
        length = self.form.seq_length + 1
        position = np.arange(index * length, (index + 1) * length, dtype=np.uint64)
        return (_mix(self._start + position * _GOLDEN) % np.uint64(self.form.vocab_size)).astype(np.int64)

    def sample(self, index: int) -> Sample:
        return self.form.arrays(self.text(index))


class MockBertDataset:
    """Full-length BERT samples of such tokens: two sentences of equal length, or one without the binary head."""

    def __init__(self, split: int, num_samples: int, seed: int, form: BertSampleForm):
        self.form, self._seed = form, seed
        self._text = MockDataset(split, num_samples, seed, GPTSampleForm(form.longest - 1, form.vocab_size, eod=-1))
        self.digest = hashlib.sha256(f"{self._text.digest} {json.dumps(form.key())}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._text)

    def sample(self, index: int) -> Sample:
        text = self._text.text(index)
        half = len(text) // 2
        lengths = np.array([half, len(text) - half] if self.form.binary_head else [len(text)], dtype=np.int32)
        random = np.random.RandomState((self._seed + index) % 2**32)
        return self.form.arrays(text, lengths, self.form.longest, random)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters neighbouring numbers."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
