"""Long samples first and then their parts: every token of the text once, in order, by counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.data.gpt.parts import LongSamples, PartedDataset
from megatron_ltd.data.mock_dataset import MockDataset
from megatron_ltd.data.sample import GPTSampleForm

PARTS, LENGTH = 3, 4


def long_samples(count: int) -> MockDataset:
    """Samples of 12 tokens, with a loss mask that has gaps."""
    return MockDataset(0, count, 5, GPTSampleForm(PARTS * LENGTH, 40, eod=7, eod_mask_loss=True))


@given(st.integers(0, 6), st.integers(0, 9))
def test_the_samples_are_the_text_of_the_long_ones_cut_by_hand(first: int, count: int) -> None:
    long = long_samples(count)
    found = PartedDataset(long, LongSamples(first, PARTS))
    expected = []
    for number in range(count):
        arrays = long.sample(number)
        pieces = [slice(0, PARTS * LENGTH)] if number < first else [
            slice(LENGTH * part, LENGTH * (part + 1)) for part in range(PARTS)]
        expected += [{name: array[piece] for name, array in arrays.items()} for piece in pieces]
    assert len(found) == len(expected)
    for index, wanted in enumerate(expected):
        sample = found.sample(index)
        assert sample.keys() == wanted.keys() == {"tokens", "labels", "loss_mask"}
        assert all(np.array_equal(sample[name], wanted[name]) for name in wanted), index


def test_the_label_of_a_parts_last_token_is_the_first_token_of_the_next_part() -> None:
    found = PartedDataset(long_samples(4), LongSamples(1, PARTS))
    for index in (1, 2, 4, 5):
        assert found.sample(index)["labels"][-1] == found.sample(index + 1)["tokens"][0]


@given(st.integers(0, 6), st.integers(0, 40))
def test_as_many_long_samples_are_needed_as_hold_what_is_read(first: int, read: int) -> None:
    """The least number with which every sample of the run exists."""
    form = LongSamples(first, PARTS)
    needed = form.needed(read)
    assert len(PartedDataset(long_samples(needed), form)) >= read
    assert needed == 0 or len(PartedDataset(long_samples(needed - 1), form)) < read


def test_a_sample_that_does_not_exist_is_refused() -> None:
    found = PartedDataset(long_samples(4), LongSamples(2, PARTS))
    for index in (-1, 2 + 2 * PARTS):
        with pytest.raises(IndexError, match=f"sample {index} of 8"):
            found.sample(index)


def test_the_digest_follows_the_text_and_the_parts() -> None:
    digests = {PartedDataset(long_samples(count), LongSamples(first, PARTS)).digest
               for count, first in ((4, 1), (4, 2), (5, 1))}
    assert len(digests) == 3
    assert PartedDataset(long_samples(4), LongSamples(1, PARTS)).digest in digests
