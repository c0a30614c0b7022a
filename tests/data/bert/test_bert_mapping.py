import hashlib
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_ltd.data import native
from megatron_ltd.data.bert.mapping import build_mapping, mt19937_64
from megatron_ltd.errors import DataError
from megatron_ltd.log import Console

PATHS = [pytest.param(True, marks=pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1]), id="compiled"),
         pytest.param(False, id="Python")]

GOLDEN = {
    (None, 100, 0.1, 1234, 2): "791c045083f0cd1f20d8b21ce2ae09ff5413b751fcd22f0cecfede9ccbae736e",
    (50, 30, 0.1, 1234, 2): "7779823ed70533424576b58d39c1b7ba8a0f323cf4903411bfece8b14ad2e917",
    (500, 30, 0.5, 7, 1): "b82cb927a8a2517dd06d80eec47d58cd7153ec2c72fdd1912cfff70af66a7146",
    (90, 2, 1.0, 99, 2): "5e6c885c4d571588cde3d80db3d68497313ba5f50a8175600330607b274cf88c",
    (200, 60, 0.0, 2147483646, 1): "0d7192bc4b49ae6bc982b2129600f3833fc14015c309d55652ce8ee483b2cb8f",
    (200, 60, 0.4, 3, 2): "09cbeb56adafa67d2085ac49abad9c0b5a20f17b8a1e96f149f76a9a73951a40",
}
"""(samples, longest, short_seq_prob, seed, least sentences): SHA-256 of megatron-core 0.16.1's mapping of `part`."""


def part() -> tuple[np.ndarray, np.ndarray]:
    """Documents [5, 105) of 110, of 0 to 8 sentences; one in about 25 sentences is too long."""
    counts = np.array([(i * i * 7) % 9 for i in range(110)])
    lengths = np.array([700 if i % 97 == 13 else 1 + (i * i * 5) % 37 for i in range(counts.sum())], dtype=np.int32)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)[5:106], lengths


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("arguments", list(GOLDEN))
def test_the_mapping_is_the_recorded_one_of_megatron_core(
        arguments: tuple[int | None, int, float, int, int], compiled: bool) -> None:
    rows = build_mapping(*part(), *arguments, native=compiled)
    assert rows.dtype == np.uint32
    assert hashlib.sha256(rows.tobytes()).hexdigest() == GOLDEN[arguments]


def test_both_mappings_equal_megatron_cores_in_many_configurations(bert_oracle: ModuleType) -> None:
    random = np.random.default_rng(11)
    compared = 0
    compiled = native.load()[0] is not None
    for _ in range(300):
        counts = random.integers(0, 9, int(random.integers(1, 40)))
        documents = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64) + int(random.integers(0, 5))
        lengths = random.integers(0, int(random.choice([5, 40, 600])), int(documents[-1]) + 3).astype(np.int32)
        arguments = (int(random.integers(1, 200)), int(random.integers(2, 200)),
                     float(random.choice([0.0, 0.1, 0.4, 1.0, 0.001, random.random()])),
                     int(random.integers(0, 2**31 - 2)), int(random.integers(1, 3)))
        try:
            mine = build_mapping(documents, lengths, *arguments, native=False)
        except DataError:  # megatron-core would search for a sample without end
            continue
        theirs = bert_oracle.mapping(documents, lengths, *arguments)
        found = [mine, build_mapping(documents, lengths, *arguments)] if compiled else [mine]
        assert all(rows.dtype == theirs.dtype and np.array_equal(rows, theirs) for rows in found), arguments
        compared += 1
    assert compared > 250


def test_a_small_mapping_matches_a_calculation_by_hand() -> None:
    documents = np.array([0, 5, 6, 8], dtype=np.int64)
    lengths = np.array([4, 4, 4, 4, 4, 9, 600, 1], dtype=np.int32)
    # The first document: two sentences reach 8, and three are left; of those three the second leaves only one, so the
    # run takes all. The second document has one sentence, the third a long one.
    rows = build_mapping(documents, lengths, None, 8, 0.0, 1, 2, native=False)
    assert sorted(rows.tolist()) == [[0, 2, 8], [2, 5, 8]]
    rows = build_mapping(documents, lengths, None, 8, 0.0, 1, 1, native=False)
    assert sorted(rows.tolist()) == [[0, 2, 8], [2, 5, 8], [5, 6, 8]]


def test_the_generator_gives_the_number_that_the_standard_of_cpp_asks_for() -> None:
    assert next(islice(mt19937_64(5489), 9999, None)) == 9981545732273789042


@pytest.mark.parametrize("compiled", PATHS)
@pytest.mark.parametrize("lengths", [[5, 5, 600], [], [5]])
def test_a_part_that_yields_no_sample_is_an_error_rather_than_an_endless_search(
        lengths: list[int], compiled: bool) -> None:
    documents = np.array([0, len(lengths)], dtype=np.int64)
    with pytest.raises(DataError, match="None of 1 documents yields a sample: each has fewer than 2"):
        build_mapping(documents, np.array(lengths, dtype=np.int32), 10, 20, 0.1, 1, 2, native=compiled)


def test_documents_beyond_the_sentences_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        build_mapping(np.array([0, 3], dtype=np.int64), np.ones(2, dtype=np.int32), 1, 20, 0.1, 1, 2)


def test_without_the_compiled_helpers_python_takes_over_and_says_so_once(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, "the compiled index helpers are missing (test)"))
    monkeypatch.setattr("megatron_ltd.log._said", set())
    rows = [build_mapping(*part(), 50, 30, 0.1, 1234, 2) for _ in range(2)]
    said = capsys.readouterr().err
    assert said.startswith("WARNING: The compiled index helpers are missing (test); Python loops")
    assert said.count("WARNING") == 1
    assert np.array_equal(rows[0], build_mapping(*part(), 50, 30, 0.1, 1234, 2, native=False))


def test_a_process_that_leaves_speaking_to_another_is_silent(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, "the compiled index helpers are missing (test)"))
    monkeypatch.setattr("megatron_ltd.log._said", set())
    native.tell(Console(speaks=False))
    build_mapping(*part(), 50, 30, 0.1, 1234, 2)
    assert capsys.readouterr().err == ""


def test_the_version_of_the_compiled_helpers_is_the_one_that_is_expected() -> None:
    source = Path(native.__file__).with_name("index_helpers.cpp").read_text(encoding="utf-8")
    assert f"constexpr int kVersion = {native.VERSION};" in source
