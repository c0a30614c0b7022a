"""Corpora and documents in such numbers that they are read, checked and indexed in parts."""

import multiprocessing
import os
import resource
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import start_up
from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.data import native
from megatron_ltd.data.build import build_datasets
from megatron_ltd.data.corpus import indexed, open_files
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.gpt import index as gpt_index
from megatron_ltd.data.gpt.index import build_gpt_index
from megatron_ltd.data.text.tokenizer import NullTokenizer
from megatron_ltd.errors import DataError
from tests.data.corpora import random_documents, write_corpus, write_sentences


def open_of(folder: Path) -> int:
    """How many files below a folder this process has open."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:
            continue  # that of the listing itself
    return sum(path.startswith(str(folder)) for path in found)


def test_more_corpora_than_may_be_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "most_open", lambda: 5)
    documents = [random_documents(i, 4, 9, 1000) for i in range(12)]
    corpora = [write_corpus(tmp_path / f"c{i}", documents[i], 1000) for i in range(12)]
    failures: list[object] = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(300):
            which, document = int(random.integers(12)), int(random.integers(4))
            if corpora[which].read(document).tolist() != documents[which][document]:
                failures.append((which, document))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert open_of(tmp_path) <= 5
    corpora.clear()
    assert open_of(tmp_path) == 0


def test_a_corpus_that_another_has_replaced_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "most_open", lambda: 1)
    first = write_corpus(tmp_path / "a", [[1, 2, 3]], 10)
    write_corpus(tmp_path / "b", [[4]], 10)
    write_corpus(tmp_path / "other", [[7, 8, 9]], 10)
    os.replace(tmp_path / "other.bin", tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin was replaced or changed its size while it was in use"):
        first.read(0)


def blended(values: list[str], folder: Path, limit: int | None = None) -> tuple[list[list[int]], int]:
    """Labels of 600 samples, and how many files are open after them, of as many as the process may have open."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    config = RunConfig(model=ModelConfig(seq_length=16), training=TrainingConfig(),
                       data=DataConfig(data_path=tuple(values), split="100,0,0"))
    train = build_datasets(config, NullTokenizer(999), 600, 0, 0).train
    return [train.sample(i)["labels"].tolist() for i in range(600)], open_of(folder)


def test_a_blend_of_more_corpora_than_the_process_may_have_open(tmp_path: Path) -> None:
    values: list[str] = []
    for i in range(150):
        write_corpus(tmp_path / f"c{i}", random_documents(i, 8, 30, 1000, 999), 1000)
        values += ["1", str(tmp_path / f"c{i}")]
    with multiprocessing.get_context("forkserver").Pool(1) as pool:  # a process that has no other files open
        labels, still_open = pool.apply(blended, (values, tmp_path, 128))
    assert labels == blended(values, tmp_path)[0]
    assert 0 < still_open <= 64


def seen(prefix: str) -> list[Any]:
    """What an index holds, or why it is refused."""
    try:
        corpus = IndexedCorpus(prefix)
    except DataError as error:
        return [str(error)]
    return [corpus.sequence_lengths.tolist(), corpus._pointers.tolist(), corpus.document_indices.tolist(),
            corpus.tokens, corpus.documents, corpus.content_digest]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_an_index_is_checked_the_same_in_parts_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           chunk: int) -> None:
    write_corpus(tmp_path / "plain", [[1, 2], [], [3], [4, 5, 6], [7]], 10)
    write_sentences(tmp_path / "sentences", [[[1], [2, 3]], [], [[4], [5], [6, 7]]], 10)
    damaged = tmp_path / "damaged"
    outcomes = set()
    for name in ("plain", "sentences"):
        index, data = ((tmp_path / f"{name}{suffix}").read_bytes() for suffix in (".idx", ".bin"))
        damaged.with_suffix(".bin").write_bytes(data)
        for at in range(indexed.HEADER.size, len(index)):
            for change in (0, 1, 2, 0x80):
                damaged.with_suffix(".idx").write_bytes(index[:at] + bytes([index[at] ^ change]) + index[at + 1:])
                with monkeypatch.context() as patch:
                    at_once = seen(str(damaged))
                    patch.setattr(indexed, "_CHUNK", chunk)
                    assert seen(str(damaged)) == at_once, (name, at, change)
                outcomes.add(str(at_once[0]).partition(": expected")[2][:12])
    assert len(outcomes) >= 4


def test_boundaries_whose_differences_overflow_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1], [2], [3]], 10)
    index = bytearray((tmp_path / "c.idx").read_bytes())
    index[-24:-8] = np.array([2**63 - 1, -2], dtype="<i8").tobytes()
    (tmp_path / "c.idx").write_bytes(index)
    with pytest.raises(DataError, match="document 1 to end at sequence 9223372036854775807 or later, found -2"):
        IndexedCorpus(str(tmp_path / "c"))


def test_documents_may_be_sequences_or_hold_several(tmp_path: Path) -> None:
    plain = write_corpus(tmp_path / "plain", [[1, 2], [], [3]], 10)
    assert plain.document_indices.tolist() == [0, 1, 2, 3]
    sentences = write_sentences(tmp_path / "sentences", [[[1], [2, 3]], [], [[4]]], 10)
    assert sentences.document_indices.tolist() == [0, 2, 2, 3] and sentences.documents == 3


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_a_gpt_index_is_the_same_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    random = np.random.default_rng(chunk)
    for _ in range(60):
        lengths = random.integers(0, int(random.integers(2, 40)), int(random.integers(2, 50))).astype(np.int32)
        lengths[random.random(len(lengths)) < 0.3] = 0
        if not lengths.sum():
            continue
        arguments = (lengths, range(len(lengths)), int(random.integers(1, 200)), int(random.integers(1, 50)), 3)
        whole = build_gpt_index(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(gpt_index, "_CHUNK_DOCUMENTS", chunk)
            parts = build_gpt_index(*arguments)
        for one, other in zip(parts, whole, strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other)


@pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 7, 8, 9, 255, 256, 257, 258, 513, 624, 4097, 70000])
def test_the_compiled_shuffle_is_numpys_and_leaves_the_generator_as_numpy_does(
        monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(gpt_index, "_LONG_DOCUMENTS", 0)
    ours, reference = np.random.RandomState(size), np.random.RandomState(size)
    for _ in range(5):
        mine, expected = (np.arange(size, dtype=np.int32) for _ in range(2))
        gpt_index.shuffle(mine, ours)
        reference.shuffle(expected)
        assert np.array_equal(mine, expected)
        assert str(ours.get_state()) == str(reference.get_state())
        assert ours.random_sample() == reference.random_sample()


def test_the_benchmark_of_start_up_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    def in_this_process(folder: Path, row: str, samples: int, options: Namespace,
                        cache: str | None) -> dict[str, float]:
        assert row == "ours"
        return start_up.start_up(folder, options.seq_length, samples, cache)

    monkeypatch.setattr(start_up, "child", in_this_process)
    monkeypatch.setattr(start_up, "has_megatron", lambda: False)
    start_up.main(["--rounds", "1", "--corpora", "3", "--documents-each", "150", "--documents", "3000", "--mean-tokens",
                   "50", "--seq-length", "32", "--read-documents", "200", "--read-samples", "150", "--read-lengths",
                   "32", "--scratch", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert sum("3 corpora of 150 documents" in row for row in rows) == 5
    assert sum("1 corpus of 3,000 documents" in row for row in rows) == 5
    assert [row.split(" | ")[1] for row in rows if row.startswith("| 32")] == [
        "memory map, slice", "memory map, slice as int64", "dataset[i]", "dataset.sample(i)", "loader"]
    assert not list(tmp_path.iterdir())
