import itertools
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from megatron_ltd.errors import DataError
from tests.data.corpora import random_documents, write_corpus

Damage = Callable[[bytearray], bytearray]

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12]]
INDEX = (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 5) + struct.pack("<4i", 3, 0, 1, 4)
         + struct.pack("<4q", 0, 6, 6, 8) + struct.pack("<5q", 0, 1, 2, 3, 4))
TOKENS = struct.pack("<8H", 5, 6, 7, 8, 9, 10, 11, 12)


def put(offset: int, form: str, value: int) -> Damage:
    def damage(data: bytearray) -> bytearray:
        struct.pack_into(form, data, offset, value)
        return data
    return damage


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    (tmp_path / "c.idx").write_bytes(INDEX)
    (tmp_path / "c.bin").write_bytes(TOKENS)
    return tmp_path / "c"


def test_a_corpus_written_by_hand_is_read(prefix: Path) -> None:
    corpus = IndexedCorpus(str(prefix))
    assert [corpus.read(i).tolist() for i in range(len(corpus))] == DOCUMENTS
    assert corpus.sequence_lengths.tolist() == [3, 0, 1, 4]
    assert corpus.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert corpus.dtype == np.uint16
    assert corpus.tokens == 8


def test_the_writer_gives_the_bytes_written_by_hand(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", DOCUMENTS, vocab_size=100)
    assert (tmp_path / "c.idx").read_bytes() == INDEX
    assert (tmp_path / "c.bin").read_bytes() == TOKENS


def test_parts_of_a_sequence_can_be_read(prefix: Path) -> None:
    corpus = IndexedCorpus(str(prefix))
    assert corpus.read(3, offset=1, length=2).tolist() == [10, 11]
    assert corpus.read(3, offset=2).tolist() == [11, 12]
    assert corpus.read(1).tolist() == []
    for wrong in [(4, 0, None), (-1, 0, None), (0, 0, 4), (0, 4, None), (0, -1, 2), (2, 1, 1)]:
        with pytest.raises(IndexError):
            corpus.read(*wrong)


@given(documents=st.lists(st.lists(st.lists(st.integers(0, 70000), max_size=9), max_size=4), max_size=12),
       vocab_size=st.sampled_from([None, 65499, 65500, 70001]))
def test_what_is_written_is_read(documents: list[list[list[int]]], vocab_size: int | None) -> None:
    largest = 65498 if vocab_size == 65499 else 65499 if vocab_size == 65500 else 70000
    documents = [[[min(token, largest) for token in sequence] for sequence in document] for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "c")
        with IndexedCorpusWriter(prefix, vocab_size) as writer:
            for document in documents:
                tokens = np.array(list(itertools.chain(*document)), dtype=np.int64)
                writer.add_document(tokens, [len(sequence) for sequence in document])
        corpus = IndexedCorpus(prefix)
        sequences = [sequence for document in documents for sequence in document]
        assert [corpus.read(i).tolist() for i in range(len(corpus))] == sequences
        assert np.diff(corpus.document_indices).tolist() == [len(document) for document in documents]
        ids = [token for sequence in sequences for token in sequence]
        assert corpus.token_id_range() == (min(ids, default=0), max(ids, default=0))


DAMAGE: list[tuple[str, str, Damage, list[str]]] = [
    ("wrong magic", "idx", put(0, "<B", 0x4E), ["byte 0", "MMIDIDX", "NMIDIDX"]),
    ("wrong version", "idx", put(9, "<Q", 2), ["byte 9", "version 1", "found 2"]),
    ("unknown token type", "idx", put(17, "<B", 9), ["byte 17", "found 9"]),
    ("fractional token type", "idx", put(17, "<B", 7), ["byte 17", "found 7"]),
    ("token type of another size", "idx", put(17, "<B", 4), ["byte 58", "start at byte 12", "found 6"]),
    ("more sequences", "idx", put(18, "<Q", 5), ["134 bytes", "122 bytes"]),
    ("absurdly many sequences", "idx", put(18, "<Q", 2**63), ["expected a file of", "122 bytes"]),
    ("fewer documents", "idx", put(26, "<Q", 4), ["114 bytes", "122 bytes"]),
    ("no document boundary", "idx", put(26, "<Q", 0), ["byte 26", "at least 1 document boundary"]),
    ("negative length", "idx", put(38, "<i", -1), ["byte 38", "sequence 1", "found -1"]),
    ("longer sequence", "idx", put(34, "<i", 4), ["byte 58", "sequence 1", "byte 8", "found 6"]),
    ("shifted pointer", "idx", put(50, "<q", 1), ["byte 50", "sequence 0", "found 1"]),
    ("pointers swapped", "idx", put(74, "<q", 6), ["byte 74", "sequence 3", "byte 8"]),
    ("last sequence longer", "idx", put(46, "<i", 5), ["c.bin", "expected a file of 18 bytes", "found 16 bytes"]),
    ("first document not at 0", "idx", put(82, "<q", 1), ["byte 82", "start at sequence 0", "found 1"]),
    ("documents not ascending", "idx", put(98, "<q", 0), ["byte 98", "document 1", "found 0"]),
    ("last document short", "idx", put(114, "<q", 3), ["byte 114", "end at sequence 4", "found 3"]),
    ("empty index", "idx", lambda data: bytearray(), ["header of 34 bytes", "0 bytes"]),
    ("index cut in the header", "idx", lambda data: data[:20], ["header of 34 bytes", "20 bytes"]),
    ("index cut in the arrays", "idx", lambda data: data[:-1], ["122 bytes", "121 bytes"]),
    ("index with a tail", "idx", lambda data: data + b"\n", ["122 bytes", "123 bytes"]),
    ("multimodal index", "idx", lambda data: data + b"\0\0\0\0", ["multimodal"]),
    ("tokens cut", "bin", lambda data: data[:-2], ["c.bin", "byte 14", "16 bytes", "14 bytes"]),
    ("tokens cut within one", "bin", lambda data: data[:-1], ["c.bin", "15 bytes"]),
    ("no tokens", "bin", lambda data: bytearray(), ["c.bin", "0 bytes"]),
    ("tokens with a tail", "bin", lambda data: data + b"\0\0", ["c.bin", "18 bytes"]),
]


@pytest.mark.parametrize(("suffix", "damage", "words"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_a_damaged_corpus_is_refused_when_opened(prefix: Path, suffix: str, damage: Damage, words: list[str]) -> None:
    path = prefix.with_suffix(f".{suffix}")
    path.write_bytes(damage(bytearray(path.read_bytes())))
    with pytest.raises(DataError) as caught:
        IndexedCorpus(str(prefix))
    for word in [str(prefix), *words]:
        assert word in str(caught.value)


def test_every_accepted_change_of_one_byte_of_the_index_leaves_it_consistent(prefix: Path) -> None:
    accepted = []
    for position, flip in itertools.product(range(len(INDEX)), [1, 0x80, 0xFF]):
        changed = bytearray(INDEX)
        changed[position] ^= flip
        prefix.with_suffix(".idx").write_bytes(changed)
        try:
            corpus = IndexedCorpus(str(prefix))
        except DataError:
            continue
        accepted.append(position)
        assert b"".join(corpus.read(i).tobytes() for i in range(len(corpus))) == TOKENS
        assert corpus.sequence_lengths.tolist() == [3, 0, 1, 4]
        assert corpus.document_indices[0] == 0 and corpus.document_indices[-1] == 4
        assert (np.diff(corpus.document_indices) >= 0).all()
    assert all(90 <= position < 114 for position in accepted), "only inner document boundaries can stay consistent"


def test_the_files_of_two_corpora_do_not_fit_together(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", random_documents(1, 20, 30, 500), 500)
    write_corpus(tmp_path / "b", random_documents(2, 20, 30, 500), 500)
    (tmp_path / "a.bin").write_bytes((tmp_path / "b.bin").read_bytes())
    with pytest.raises(DataError, match=r"a\.bin, byte"):
        IndexedCorpus(str(tmp_path / "a"))


def test_a_corpus_that_shrinks_while_it_is_read_is_an_error_with_its_place(prefix: Path) -> None:
    corpus = IndexedCorpus(str(prefix))
    with open(prefix.with_suffix(".bin"), "r+b") as stream:
        stream.truncate(9)
    assert corpus.read(0).tolist() == [5, 6, 7]
    with pytest.raises(DataError, match=r"c\.bin, byte 9: expected 8 bytes from byte 8, found 1; the file has shrunk"):
        corpus.read(3)


@pytest.mark.parametrize(("asked", "answer"), [
    ("c_text_document.bin", "without .bin: .*c_text_document"), ("c", r"Did you mean .*c_text_document\?"),
    ("d", "prefix that tools/preprocess_data.py wrote")])
def test_a_prefix_that_names_no_corpus_is_answered_with_what_may_be_meant(
        tmp_path: Path, asked: str, answer: str) -> None:
    write_corpus(tmp_path / "c_text_document", DOCUMENTS)
    with pytest.raises(DataError, match=answer):
        IndexedCorpus(str(tmp_path / asked))


def test_the_digest_follows_the_lengths(tmp_path: Path) -> None:
    digests = {write_corpus(tmp_path / str(i), documents, 100).content_digest
               for i, documents in enumerate([[[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2], [3, 4]]])}
    assert len(digests) == 4
    assert write_corpus(tmp_path / "again", [[1, 2], [3]], 100).content_digest in digests


def test_spans_of_a_large_corpus_find_ids_at_both_ends(tmp_path: Path) -> None:
    body = [7] * 60000
    corpus = write_corpus(tmp_path / "c", [[90], body, [3]], 100)
    assert corpus.token_id_range(spans=2) == (3, 90)
    assert corpus.token_id_range(spans=1000) == (3, 90)
    assert corpus.token_id_range() == (3, 90)
