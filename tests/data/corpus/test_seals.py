"""A file that was found sound is not read again, unless anything about it has changed."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ltd.data.corpus import open_files, seals
from megatron_ltd.data.corpus.index_cache import cached_arrays
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.errors import DataError
from tests.data.corpora import random_documents, write_corpus

DOCUMENTS = random_documents(3, 20, 30, 500)


def set_written(path: Path, seconds_ago: float) -> None:
    written = time.time() - seconds_ago
    os.utime(path, (written, written))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A corpus that was written an hour ago."""
    write_corpus(tmp_path / "c", DOCUMENTS, 500)
    for suffix in (".idx", ".bin"):
        set_written((tmp_path / "c").with_suffix(suffix), 3600)
    return tmp_path / "c"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The corpora that are checked in full."""
    found: list[str] = []
    check = IndexedCorpus._check

    def counted(corpus: IndexedCorpus, data: bytes) -> dict[str, str]:
        found.append(corpus.prefix)
        return check(corpus, data)

    monkeypatch.setattr(IndexedCorpus, "_check", counted)
    return found


def opened(prefix: Path) -> IndexedCorpus:
    return IndexedCorpus(str(prefix), str(prefix.parent / "cache"))


@pytest.mark.parametrize("small", [0, 8 << 20], ids=["mapped", "read"])
def test_a_corpus_is_checked_once_and_the_same_afterwards(prefix: Path, checks: list[str], small: int,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_SMALL_BYTES", small)
    plain, first, later = IndexedCorpus(str(prefix)), opened(prefix), opened(prefix)
    assert len(checks) == 2
    for corpus in (first, later):
        assert [corpus.read(i).tolist() for i in range(len(corpus))] == DOCUMENTS
        assert corpus.index_sha256 == plain.index_sha256 and corpus.content_digest == plain.content_digest
        assert corpus.tokens == sum(map(len, DOCUMENTS))
        assert corpus.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))


def flip(path: Path) -> None:
    """One bit of the last number but one of .idx, or of the last token, in place."""
    with open(path, "r+b") as stream:
        stream.seek(-10, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-10, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 4]))


def flip_and_hide(path: Path) -> None:
    before = os.stat(path)
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:  # the file system's clock has not ticked since
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_a_copy(path: Path) -> None:
    before, copy = os.stat(path), path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    flip(copy)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(path)


@pytest.mark.parametrize("damage", [flip, flip_and_hide, replace_by_a_copy])
def test_a_change_of_a_sealed_index_is_found(prefix: Path, damage: Callable[[Path], None]) -> None:
    opened(prefix)
    damage(prefix.with_suffix(".idx"))
    with pytest.raises(DataError, match="damaged"):
        opened(prefix)


def test_tokens_that_are_cut_off_a_sealed_corpus_are_missed(prefix: Path) -> None:
    opened(prefix)
    os.truncate(prefix.with_suffix(".bin"), 100)
    with pytest.raises(DataError, match=r"c\.bin, byte 100: expected a file of"):
        opened(prefix)


def test_a_corpus_that_was_written_a_moment_ago_is_not_sealed(prefix: Path, checks: list[str],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "SETTLED_SECONDS", 1000.0)  # a moment in which a busy machine opens it, too
    set_written(prefix.with_suffix(".bin"), 500.0)
    opened(prefix)
    opened(prefix)
    assert len(checks) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"states": []}', b'{"states": 3, "facts": 4}'])
def test_a_damaged_seal_is_none(prefix: Path, checks: list[str], content: bytes) -> None:
    opened(prefix)
    (seal,) = (prefix.parent / "cache").glob("*.seal")
    seal.write_bytes(content)
    opened(prefix)
    assert len(checks) == 2


def test_a_seal_with_a_flipped_bit_is_none(prefix: Path) -> None:
    truth = opened(prefix)
    (seal,) = (prefix.parent / "cache").glob("*.seal")
    sound = seal.read_bytes()
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        seal.write_bytes(damaged)
        corpus = opened(prefix)
        assert (corpus.index_sha256, corpus.content_digest) == (truth.index_sha256, truth.content_digest)


def test_removing_the_seals_checks_everything_again(prefix: Path, checks: list[str]) -> None:
    folder = str(prefix.parent / "cache")
    opened(prefix)
    seals.remove_seals(folder)
    seals.remove_seals(str(prefix.parent / "no-such-folder"))
    opened(prefix)
    opened(prefix)
    assert len(checks) == 2


def test_an_index_that_was_published_is_not_read_again_until_it_changes(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_SMALL_BYTES", 0)
    made = write_corpus(tmp_path / "c", DOCUMENTS, 500).sequence_lengths
    calls: list[int] = []

    def build() -> tuple:
        calls.append(1)
        return made, made[::2]

    folder = tmp_path / "cache"
    for _ in range(2):
        first, second = cached_arrays(str(folder), {"a": 1}, build)
        assert first.tolist() == made.tolist() and second.tolist() == made[::2].tolist()
    (path,) = folder.glob("*.index")
    monkeypatch.setattr("megatron_ltd.data.corpus.index_cache._checksum", lambda *_: pytest.fail("read in full"))
    cached_arrays(str(folder), {"a": 1}, build)
    monkeypatch.undo()
    flip_and_hide(path)
    cached_arrays(str(folder), {"a": 1}, build)
    assert len(calls) == 2


def test_a_folder_that_may_only_be_read_is_used_as_it_is(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megatron_ltd.data.corpus.seals.tempfile.mkstemp", refused)
    assert opened(prefix).tokens == sum(map(len, DOCUMENTS))
