import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.data import native
from megatron_ltd.data.blend import (
    SURPLUS,
    BlendedDataset,
    BlendIndex,
    BlendSource,
    build_blend_index,
    counts,
    dataset_sizes,
    normalize,
    parse_blend,
)
from megatron_ltd.data.mock_dataset import MockDataset
from megatron_ltd.data.sample import GPTSampleForm
from megatron_ltd.errors import ConfigError

GOLDEN: dict[tuple[float, ...], str] = {
    (1.0,): "eb8d342c61e423bd2e8642360e9e7b82b24e0bb6ca29d8f1e37667c393c98276",
    (1.0, 1.0, 1.0): "ea5bee116e55884ee01ba0852b3ee8cad3481c24f0873c5a3f9cfdaad73f58fa",
    (0.3, 0.7): "a9f4c0ac5403899a2c004619d69dcc4d06342698cdab1974c161150f0f24e739",
    (30.0, 70.0): "a9f4c0ac5403899a2c004619d69dcc4d06342698cdab1974c161150f0f24e739",
    (0.001, 0.999): "a5a1567c7118e51973e16c431e11e74350d46951343d823d7fb0c376a6633357",
    (1.0, 2.0, 3.0, 4.0, 5.0): "e382d03251e51cafa0873f27429bbbed5fe8ff72e7166bbb86ca7b757b1990ef",
}
"""Weights: SHA-256 of the 1,000 samples of megatron-core 0.16.1's blend."""

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


def digest(index: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(index[0].astype("<i2").tobytes() + index[1].astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("weights", list(GOLDEN))
def test_the_blend_is_the_recorded_one_of_megatron_core(weights: tuple[float, ...]) -> None:
    for compiled in (True, False):
        assert digest(build_blend_index(weights, 1000, native=compiled)) == GOLDEN[weights]


def test_the_blend_equals_megatron_cores_for_many_weights() -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers")
    random = np.random.default_rng(8)
    for trial in range(150):
        count, size = int(random.integers(1, 12)), int(random.integers(1, 800))
        kinds = [random.random(count) + 1e-3, random.integers(1, 5, count), np.ones(count),
                 10.0 ** random.integers(-3, 4, count)]
        weights = np.asarray(kinds[trial % 4], dtype=np.float64).tolist()
        dataset_index, dataset_sample_index = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(
            dataset_index, dataset_sample_index, np.array(normalize(weights)), count, size, False)
        ours = build_blend_index(weights, size)
        assert np.array_equal(ours[0], dataset_index) and np.array_equal(ours[1], dataset_sample_index), weights


@given(weights=WEIGHTS, size=st.integers(0, 300))
def test_every_dataset_is_walked_in_order_and_gets_its_share(weights: list[float], size: int) -> None:
    dataset_index, dataset_sample_index = build_blend_index(weights, size)
    for dataset, share in enumerate(normalize(weights)):
        walked = dataset_sample_index[dataset_index == dataset]
        assert walked.tolist() == list(range(len(walked)))
        assert len(walked) <= share * max(size - 1, 1) + 1 + 1e-9
    assert len(dataset_index) == size


@pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])
@given(weights=WEIGHTS, size=st.integers(0, 2000))
def test_the_compiled_blend_is_the_one_of_numpy(weights: list[float], size: int) -> None:
    for mine, reference in zip(build_blend_index(weights, size), build_blend_index(weights, size, native=False),
                               strict=True):
        assert mine.dtype == reference.dtype and np.array_equal(mine, reference)


@pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])
@pytest.mark.parametrize("count", [63, 64, 65, 200, 700])
def test_the_compiled_blend_of_many_datasets_is_the_one_of_numpy(count: int) -> None:
    random = np.random.default_rng(count)
    for weights in (np.ones(count), 1 + np.arange(count) % 7.0, random.lognormal(0, 3, count),
                    10.0 ** -random.integers(0, 12, count)):
        mine, reference = (build_blend_index(weights.tolist(), 2500, native=compiled) for compiled in (True, False))
        assert all(np.array_equal(one, other) for one, other in zip(mine, reference, strict=True))


def test_two_samples_of_three_come_from_the_heavier_dataset() -> None:
    assert build_blend_index([2, 1], 6)[0].tolist() == [0, 1, 0, 0, 1, 0]
    assert build_blend_index([1, 1], 4)[0].tolist() == [0, 1, 0, 1]


def test_sizes_have_megatrons_margin() -> None:
    builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder")
    random = np.random.default_rng(5)
    for _ in range(100):
        weights = normalize(random.random(int(random.integers(1, 8))).tolist())
        for surplus in (0.0, SURPLUS):
            reference = builder._get_size_per_split_per_dataset(weights, [1000, 7], surplus)
            ours = [dataset_sizes(samples, weights, surplus) for samples in (1000, 7)]
            assert [list(sizes) for sizes in zip(*ours, strict=True)] == reference


@pytest.mark.parametrize(("values", "prefixes", "weights"), [
    (["a"], ("a",), None),
    (["a", "b", "c"], ("a", "b", "c"), None),
    (["a", "b"], ("a", "b"), None),
    (["0.3", "a", "0.7", "b"], ("a", "b"), (0.3, 0.7)),
    (["30", "a", "70", " b "], ("a", "b"), (30.0, 70.0)),
    (["1", "a"], ("a",), (1.0,)),
    (["1", "a", "2"], ("1", "a", "2"), None),
])
def test_a_data_path_is_read_as_megatron_does(
        values: list[str], prefixes: tuple[str, ...], weights: tuple[float, ...] | None) -> None:
    assert parse_blend("--data-path", values) == BlendSource(prefixes, weights)
    reference = pytest.importorskip("megatron.core.datasets.utils").get_blend_from_list(values)
    assert reference == (list(prefixes), list(weights) if weights else None)


@pytest.mark.parametrize(("values", "words"), [
    ([], "give the prefix"), ([""], "give the prefix"), (["1", " "], "give the prefix"),
    (["1", "a", "b", "c"], "some corpora have a weight and others do not"),
    (["nan", "a", "1", "b"], "weight = nan must be a number above 0"),
    (["inf", "a", "1", "b"], "weight = inf must be"), (["-1", "a", "2", "b"], "weight = -1.0 must be"),
    (["0", "a", "0", "b"], "weight = 0.0 must be"), (["0", "a", "1", "b"], "weight = 0.0 must be")])
def test_weights_that_are_none_are_refused(values: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_blend("--valid-data-path", values)


def mock(samples: int) -> MockDataset:
    return MockDataset(samples, samples, 1, GPTSampleForm(4, 100, 3))


def test_a_blended_dataset_gives_the_samples_of_its_datasets() -> None:
    parts = [mock(12), mock(9)]
    blend = BlendedDataset(parts, BlendIndex([2, 1], 18))
    assert len(blend) == 18
    taken = [0, 0]
    for i, part in enumerate(build_blend_index([2, 1], 18)[0].tolist()):
        assert blend.sample(i)["labels"].tolist() == parts[part].text(taken[part]).tolist()[1:]
        taken[part] += 1
    with pytest.raises(IndexError):
        blend.sample(18)


def test_a_blend_that_draws_more_than_a_dataset_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="draws 12 samples from dataset 0, which holds 11"):
        BlendedDataset([mock(11), mock(9)], BlendIndex([2, 1], 18))


def test_the_digest_of_a_blend_follows_its_parts() -> None:
    blends = [BlendedDataset([mock(30), mock(31)], BlendIndex([2, 1], 18)),
              BlendedDataset([mock(31), mock(30)], BlendIndex([2, 1], 18)),
              BlendedDataset([mock(30), mock(31)], BlendIndex([1, 2], 18)),
              BlendedDataset([mock(30), mock(31)], BlendIndex([2, 1], 19))]
    assert len({blend.digest for blend in blends}) == 4


def test_counting_the_samples_of_a_blend_takes_no_copy_of_its_index() -> None:
    index = np.arange(1 << 22, dtype=np.int16) % 3
    tracemalloc.start()
    found = counts(index, 4)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [np.count_nonzero(index == number) for number in range(4)]
    assert peak_bytes < 2 * index.nbytes  # an int64 copy has four times as many


def test_a_blend_index_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BlendIndex([1, 3], 50, str(tmp_path))

    def refuse(*_: object) -> None:
        raise RuntimeError("built again")

    monkeypatch.setattr("megatron_ltd.data.blend.build_blend_index", refuse)
    again = BlendIndex([1, 3], 50, str(tmp_path))
    assert again.dataset_index.tolist() == first.dataset_index.tolist()
    assert again.drawn == first.drawn
    with pytest.raises(RuntimeError, match="built again"):
        BlendIndex([1, 4], 50, str(tmp_path))
