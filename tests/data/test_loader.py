import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.data.gpt.dataset import GPTDataset
from megatron_ltd.data.loader import Batch, Loader, microbatches, read_microbatch, sample_ids
from megatron_ltd.data.mock_dataset import MockDataset
from megatron_ltd.data.sample import GPTSampleForm, Sample
from megatron_ltd.errors import ConfigError, DataError
from tests.data.corpora import random_documents, write_corpus

FORM = GPTSampleForm(8, 100, 3)


class Failing:
    """Serves samples until one that cannot be read."""

    digest = ""

    def __init__(self, bad: int):
        self.bad, self.inner = bad, MockDataset(0, 1000, 1, FORM)

    def __len__(self) -> int:
        return len(self.inner)

    def sample(self, index: int) -> Sample:
        if index == self.bad:
            raise DataError(f"sample {index} cannot be read")
        return self.inner.sample(index)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True))


def test_order_equals_megatrons_sampler() -> None:
    """In each stretch of micro_batch_size x dp_size samples, one microbatch for each data-parallel rank in turn."""
    assert sample_ids(100, 12, 2, 0, 3) == [range(100, 102), range(106, 108)]
    assert sample_ids(100, 12, 2, 1, 3) == [range(102, 104), range(108, 110)]
    assert sample_ids(100, 12, 2, 2, 3) == [range(104, 106), range(110, 112)]


@given(micro=st.integers(1, 4), dp=st.integers(1, 5), count=st.integers(1, 5), consumed=st.integers(0, 10**12))
def test_a_step_holds_each_of_its_samples_once_for_every_layout(micro: int, dp: int, count: int, consumed: int) -> None:
    parts = [sample_ids(consumed, micro * dp * count, micro, rank, dp) for rank in range(dp)]
    assert all(len(ids) == count and all(len(one) == micro for one in ids) for ids in parts)
    everything = sorted(i for ids in parts for one in ids for i in one)
    assert everything == list(range(consumed, consumed + micro * dp * count))


@given(consumed=st.integers(0, 50).map(lambda n: 12 * n), size=st.sampled_from([12, 24]))
def test_a_resumed_run_reads_what_the_uninterrupted_one_would_have(consumed: int, size: int) -> None:
    """Whatever the layout before and after: microbatches of one sample and rank reassemble in order of their ids."""
    dataset = MockDataset(0, 1000, 1, FORM)
    expected = [dataset.text(i)[:-1].tolist() for i in range(consumed, consumed + size)]
    for micro, dp in [(1, 1), (2, 3), (4, 1), (3, 4), (12, 1)]:
        found = {}
        for rank in range(dp):
            for batch in microbatches(dataset, consumed, size, micro, rank, dp):
                found.update(zip(batch["sample_ids"].tolist(), batch["tokens"].tolist(), strict=True))
        assert [found[i] for i in range(consumed, consumed + size)] == expected


def test_a_microbatch_has_the_shapes_and_types_of_the_contract(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_documents(1, 30, 30, 100), 100)
    form = GPTSampleForm(8, 100, 3, reset_position_ids=True, reset_attention_mask=True)
    dataset = GPTDataset(corpus, range(30), 40, 1, form)
    first, second = microbatches(dataset, 4, 12, 3, 1, 2)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in first.items()} == {
        "tokens": ((3, 8), torch.int64), "labels": ((3, 8), torch.int64), "loss_mask": ((3, 8), torch.float32),
        "position_ids": ((3, 8), torch.int64), "document_ids": ((3, 8), torch.int64), "sample_ids": ((3,), torch.int64)}
    assert first["sample_ids"].tolist() == [7, 8, 9]
    assert second["sample_ids"].tolist() == [13, 14, 15]
    assert first["tokens"][1].tolist() == dataset.text(8)[:-1].tolist()
    assert first["labels"][1].tolist() == dataset.text(8)[1:].tolist()


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_nothing(workers: int) -> None:
    dataset = MockDataset(0, 200, 1, FORM)
    with Loader(dataset, 2, 1, 2, num_workers=workers) as loader:
        consumed = 0
        for size in [8, 8, 12, 12, 4, 24, 24]:  # also while the batch size changes
            assert same(loader.step(consumed, size), microbatches(dataset, consumed, size, 2, 1, 2))
            consumed += size
        for place in [0, 160, 40]:  # and when another part is asked for
            assert same(loader.step(place, 8), microbatches(dataset, place, 8, 2, 1, 2))
        assert same(loader.step(184, 16), microbatches(dataset, 184, 16, 2, 1, 2))


def test_samples_are_read_ahead_in_the_background() -> None:
    read: list[tuple[int, str]] = []
    done = threading.Event()

    class Watched(Failing):
        def sample(self, index: int) -> Sample:
            read.append((index, threading.current_thread().name))
            if index == 7:
                done.set()
            return super().sample(index)

    with Loader(Watched(-1), 2, 0, 1, num_workers=2) as loader:
        loader.step(0, 4)
        assert done.wait(timeout=60)
    assert sorted(index for index, _ in read) == list(range(8))
    assert all(name.startswith("samples") for _, name in read)


def test_a_sample_that_cannot_be_read_is_an_error_of_this_process_alone() -> None:
    """In validation as in training: no other process could say why, and another attempt may be able to read it."""
    with pytest.raises(DataError, match="sample 9 cannot be read") as caught:
        read_microbatch(Failing(9), range(8, 10))
    assert not caught.value.everywhere


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_stops_the_step_that_needs_it(workers: int) -> None:
    with Loader(Failing(bad=9), 2, 0, 1, num_workers=workers) as loader:
        assert len(loader.step(0, 8)) == 4
        with pytest.raises(DataError, match="sample 9 cannot be read"):
            loader.step(8, 8)
        assert len(loader.step(16, 8)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_of_the_dataset_is_an_error_and_not_a_hang(workers: int) -> None:
    with Loader(MockDataset(0, 20, 1, FORM), 2, 0, 2, num_workers=workers) as loader:
        assert len(loader.step(12, 8)) == 2
        with pytest.raises(DataError, match=r"asks for sample 21, and the dataset holds 20"):
            loader.step(20, 8)


@pytest.mark.parametrize("size", [0, -4, 3, 6])
def test_a_global_batch_that_cannot_be_shared_out_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"--global-batch-size = {size} must be a multiple .* 2 x 2 = 4"):
        sample_ids(0, size, 2, 0, 2)
