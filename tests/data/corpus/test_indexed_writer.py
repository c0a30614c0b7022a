import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter, dtype_for_vocab
from megatron_ltd.errors import DataError
from tests.data.corpora import random_documents, write_corpus

GOLDEN = {
    "bin": "520f9b8265d0216c86d305dd2af6e5e9b88eb7c4555e38e04da38b1c37902eec",
    "idx": "316f70a8256d21eae2fc65617a8dc5ffdf1fe358d5557b08093674f786e61d97",
}
"""SHA-256 of the files that megatron-core 0.16.1 writes for `golden_documents`."""


def golden_documents() -> list[list[int]]:
    return [[(37 * i + 11 * j) % 50257 for j in range(i * i % 23)] for i in range(200)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_corpus_has_the_recorded_bytes_of_megatron_core(tmp_path: Path) -> None:
    with IndexedCorpusWriter(str(tmp_path / "c"), 50257) as writer:
        for document in golden_documents():
            writer.add_document(document)
    assert {suffix: sha256(tmp_path / f"c.{suffix}") for suffix in GOLDEN} == GOLDEN


@pytest.mark.parametrize("vocab_size", [None, 500, 65499, 65500, 200000])
def test_a_corpus_has_the_bytes_that_megatron_core_writes(tmp_path: Path, vocab_size: int | None) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = random_documents(3, 300, 40, min(vocab_size or 200000, 200000))
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), indexed.DType.optimal_dtype(vocab_size))
    with IndexedCorpusWriter(str(tmp_path / "c"), vocab_size) as writer:
        for number, document in enumerate(documents):
            lengths = [len(document) // 3, len(document) - len(document) // 3] if number % 5 == 0 else None
            writer.add_document(document, lengths)
            builder.add_document(document, lengths or ([len(document)] if document else []))
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"c.{suffix}").read_bytes() == (tmp_path / f"m.{suffix}").read_bytes()


def test_megatron_core_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = random_documents(4, 100, 40, 70000)
    write_corpus(tmp_path / "ours", documents, 70000)
    theirs = indexed.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedCorpus(str(tmp_path / "theirs"))
    assert [ours.read(i).tolist() for i in range(len(ours))] == documents


def test_documents_added_together_and_one_by_one_give_the_same_bytes(tmp_path: Path) -> None:
    documents = random_documents(5, 50, 10, 100)
    with IndexedCorpusWriter(str(tmp_path / "one"), 100) as writer:
        for document in documents:
            writer.add_document(document)
    lengths = np.array([len(document) for document in documents])
    with IndexedCorpusWriter(str(tmp_path / "all"), 100) as writer:
        writer.add_documents(np.concatenate(documents).astype(np.int64), lengths[lengths > 0], lengths > 0)
        assert (writer.documents, writer.tokens) == (50, lengths.sum())
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"all.{suffix}").read_bytes()


@pytest.mark.parametrize(("vocab_size", "name"), [(None, "int32"), (2, "uint16"), (65499, "uint16"), (65500, "int32")])
def test_the_token_type_follows_megatrons_rule(vocab_size: int | None, name: str) -> None:
    assert dtype_for_vocab(vocab_size).name == name


@pytest.mark.parametrize(("vocab_size", "dtype", "token"), [
    (100, None, 100), (100, None, -1), (None, np.dtype("u2"), 65536), (None, None, 2**31), (None, np.dtype("u1"), 256)])
def test_a_token_id_that_does_not_fit_is_refused_and_nothing_is_left(
        tmp_path: Path, vocab_size: int | None, dtype: np.dtype | None, token: int) -> None:
    with pytest.raises(DataError, match=rf"token id = {token} is outside"):
        with IndexedCorpusWriter(str(tmp_path / "c"), vocab_size, dtype) as writer:
            writer.add_document([1, 2, 3])
            writer.add_document([1, token])
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_longer_than_the_format_holds_is_refused(tmp_path: Path) -> None:
    tokens = np.broadcast_to(np.uint8(1), 2**31)  # takes no memory
    with pytest.raises(DataError, match=r"2147483648 tokens; the format holds at most 2147483647"):
        with IndexedCorpusWriter(str(tmp_path / "c")) as writer:
            writer.add_document(tokens)


def test_a_failure_leaves_the_old_corpus_as_it_was(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1, 2], [3]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="stop"):
        with IndexedCorpusWriter(str(tmp_path / "c")) as writer:
            writer.add_document(range(1000))
            raise RuntimeError("stop")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_old_corpus_can_be_read_until_the_new_one_is_complete(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1, 2], [3]])
    with IndexedCorpusWriter(str(tmp_path / "c")) as writer:
        writer.add_document([4, 5, 6])
        assert IndexedCorpus(str(tmp_path / "c")).read(0).tolist() == [1, 2]
    assert IndexedCorpus(str(tmp_path / "c")).read(0).tolist() == [4, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_a_killed_writer_leaves_no_corpus_and_the_next_one_succeeds(tmp_path: Path) -> None:
    program = ("import os, signal, sys\n"
               "from megatron_ltd.data.corpus.writer import IndexedCorpusWriter\n"
               "writer = IndexedCorpusWriter(sys.argv[1])\n"
               "writer.add_document(range(100000))\n"
               "os.kill(os.getpid(), signal.SIGKILL)\n")
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c")], check=False)
    assert run.returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="no file"):
        IndexedCorpus(str(tmp_path / "c"))
    assert write_corpus(tmp_path / "c", [[1]]).tokens == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_two_writers_of_one_corpus_do_not_mix(tmp_path: Path) -> None:
    with IndexedCorpusWriter(str(tmp_path / "c")) as writer:
        writer.add_document([1, 2])
        with pytest.raises(DataError, match="being written by another process"):
            IndexedCorpusWriter(str(tmp_path / "c"))
    assert IndexedCorpus(str(tmp_path / "c")).read(0).tolist() == [1, 2]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/c\.bin cannot be written.*--output"):
        IndexedCorpusWriter(str(tmp_path / "file" / "c"))


def test_missing_folders_are_made(tmp_path: Path) -> None:
    assert write_corpus(tmp_path / "a" / "b" / "c", [[1]]).tokens == 1
