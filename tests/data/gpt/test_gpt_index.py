import hashlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ltd.data.gpt.index import build_gpt_index, split_bounds, split_range
from megatron_ltd.errors import ConfigError, DataError
from tests.data.corpora import random_documents, write_corpus

GOLDEN = {
    (None, 16, 1234): "42203f4bb6c27365f618a50252663ee9d0fb65a94609b9ae5bf09b1dcd738c5a",
    (50, 16, 1234): "42203f4bb6c27365f618a50252663ee9d0fb65a94609b9ae5bf09b1dcd738c5a",
    (120, 16, 1234): "4b0b024ea6fe8e42275b7db138178958a539b25cec05743aaa6f01b343364d6e",
    (160, 16, 99): "4a2a18c91344a60943e67779670b5b6180f8f6d380770446fb60946a79fd6a5d",
    (230, 16, 7): "f4792ba01c56ebbe75b0b3523c5aad851c26f4d5e12f1d1d0a212f8eea1fe0a9",
    (1000, 33, 2147483648): "9f434b3b33c219a090479e2c071154a8aa21306f7249dcfa946ea8e8756f5f8a",
    (5, 1, 0): "e3d07ee040b51e63b9b26f9165256557eb28685eb7f09a611097d9b31651ee96",
}
"""(samples, sequence length, seed): SHA-256 of the arrays that megatron-core 0.16.1 builds from `golden_lengths`."""


def golden_lengths() -> np.ndarray:
    return np.array([(i * i * 7) % 41 for i in range(100)], dtype=np.int32)


def digest(arrays: tuple[np.ndarray, ...]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


@pytest.mark.parametrize("arguments", list(GOLDEN))
def test_the_index_is_the_recorded_one_of_megatron_core(arguments: tuple[int | None, int, int]) -> None:
    samples, seq_length, seed = arguments
    index = build_gpt_index(golden_lengths(), range(10, 90), samples, seq_length, seed)
    assert digest(index) == GOLDEN[arguments]


def test_the_index_equals_megatron_cores_in_many_configurations(oracle: ModuleType, tmp_path: Path) -> None:
    random = np.random.default_rng(20)
    kinds = set()
    for trial in range(120):
        documents = random_documents(trial, int(random.integers(1, 60)), int(random.integers(1, 80)), 50257)
        documents.append([1, 2])  # at least one token
        prefix = tmp_path / str(trial)
        lengths = write_corpus(prefix, documents, 50257).sequence_lengths
        first = int(random.integers(0, len(documents)))
        sequences = range(first, int(random.integers(first + 1, len(documents) + 1)))
        if lengths[sequences.start:sequences.stop].sum() < 2:
            sequences = range(0, len(documents))
        tokens = int(lengths[sequences.start:sequences.stop].sum())
        seq_length = int(random.integers(1, max(tokens // 2, 2)))
        samples = None if trial % 10 == 0 else int(random.integers(1, 6 * tokens // seq_length + 2))
        seed = int(random.integers(0, 2**31))
        theirs = oracle.gpt_dataset(prefix, sequences, samples, oracle.gpt_config(seed, seq_length, tmp_path / "cache"))
        ours = build_gpt_index(lengths, sequences, samples, seq_length, seed)
        for mine, reference in zip(
                ours, [theirs.document_index, theirs.sample_index, theirs.shuffle_index], strict=True):
            assert mine.dtype == reference.dtype
            assert np.array_equal(mine, reference), (trial, sequences, samples, seq_length, seed)
        epochs = len(ours.document_index) // len(sequences)
        last = len(ours.document_index) - len(sequences)
        first_of_last = int(np.searchsorted(ours.sample_index[:, 0], last))
        kinds.add((min(epochs, 3), bool((ours.shuffle_index[first_of_last + 1:] > first_of_last).all())))
    assert {(1, False), (2, False), (2, True), (3, False), (3, True)} <= kinds, "some kind of index was not compared"


def test_a_small_index_matches_a_calculation_by_hand() -> None:
    lengths = np.array([3, 0, 4], dtype=np.int32)
    index = build_gpt_index(lengths, range(0, 3), 2, 3, 7)
    order = np.random.RandomState(7)
    documents = np.array([0, 1, 2])
    order.shuffle(documents)
    shuffle = np.array([0, 1])
    order.shuffle(shuffle)
    assert index.document_index.tolist() == documents.tolist()
    assert index.shuffle_index.tolist() == shuffle.tolist()
    stream = [(position, offset) for position, document in enumerate(documents) for offset in range(lengths[document])]
    assert index.sample_index.tolist() == [[0, 0], list(stream[3]), list(stream[6])]


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30), samples=st.integers(0, 200),
       seq_length=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_samples_cut_the_shuffled_stream_into_equal_stretches(
        lengths: list[int], samples: int, seq_length: int, seed: int) -> None:
    lengths[0] += 1
    sizes = np.array(lengths, dtype=np.int32)
    index = build_gpt_index(sizes, range(len(lengths)), samples, seq_length, seed)
    starts = np.concatenate([[0], np.cumsum(sizes[index.document_index], dtype=np.int64)])
    positions = starts[index.sample_index[:, 0]] + index.sample_index[:, 1]
    assert positions.tolist() == [n * seq_length for n in range(len(index.shuffle_index) + 1)]
    assert (index.sample_index[1:, 1] < sizes[index.document_index[index.sample_index[1:, 0]]]).all()
    assert sorted(index.shuffle_index.tolist()) == list(range(len(index.shuffle_index)))
    assert len(index.shuffle_index) >= samples
    epochs = len(index.document_index) // len(lengths)
    assert sorted(index.document_index.tolist()) == sorted(list(range(len(lengths))) * epochs)
    assert epochs == 1 or (epochs - 1) * sizes.sum() < samples * seq_length + 1, "more epochs than needed"


def test_the_index_depends_on_seed_and_nothing_hidden() -> None:
    lengths = golden_lengths()
    first = build_gpt_index(lengths, range(100), 300, 16, 5)
    np.random.seed(9)
    assert digest(first) == digest(build_gpt_index(lengths, range(100), 300, 16, 5))
    assert digest(first) != digest(build_gpt_index(lengths, range(100), 300, 16, 6))


def test_a_part_without_tokens_is_refused_rather_than_repeated_for_ever() -> None:
    with pytest.raises(DataError, match="sequences 1 to 3 of 4 hold 0 tokens"):
        build_gpt_index(np.array([5, 0, 0, 7], dtype=np.int32), range(1, 3), 10, 4, 1)


def test_a_corpus_with_too_many_sequences_for_the_index_is_refused() -> None:
    lengths = np.broadcast_to(np.int32(1), 2**31 + 5)
    with pytest.raises(DataError, match="2147483653 sequences"):
        build_gpt_index(lengths, range(2**31 + 5), 10, 4, 1)


def test_the_number_of_samples_of_a_long_corpus_is_exact() -> None:
    lengths = np.array([17_801_218], dtype=np.int32)  # in float32 this is one sample short
    assert len(build_gpt_index(lengths, range(1), None, 1024, 1).shuffle_index) == (17_801_218 - 1) // 1024


@pytest.mark.parametrize(("split", "ranges"), [
    ("969,30,1", [(0, 969), (969, 999), (999, 1000)]),
    ("8,1,1", [(0, 800), (800, 900), (900, 1000)]),
    ("1", [(0, 1000), None, None]),
    ("0.5, 0.5", [(0, 500), (500, 1000), None]),
    ("0,1,0", [None, (0, 1000), None]),
    ("1,1,1", [(0, 333), (333, 667), (667, 1000)]),
])
def test_a_split_shares_out_the_corpus(split: str, ranges: list[tuple[int, int] | None]) -> None:
    found = [split_range(bounds, 1000) if bounds else None for bounds in split_bounds(split)]
    assert found == [range(*pair) if pair else None for pair in ranges]


def test_splits_equal_megatron_cores() -> None:
    reference = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config")
    random = np.random.default_rng(3)
    texts = ["969,30,1", "99,1,0", "100,0,0", "949,50,1", "98.5,1,.5", "7,2", "0.001,999,0.1"]
    texts += [",".join(str(share) for share in random.integers(0, 1000, 3)) for _ in range(50)]
    for text in texts:
        vector = reference.parse_and_normalize_split(text)
        assert list(split_bounds(text)) == reference.convert_split_vector_to_split_matrix(vector)


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "0,0,0", "-1,2,3", "nan,1,1", "inf,1", "1;2;3", "1,,2"])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="--split = "):
        split_bounds(split)
