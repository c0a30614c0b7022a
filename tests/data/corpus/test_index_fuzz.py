"""An index with any damage is refused, or serves the tokens that were written."""

import os
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ltd.data.corpus.indexed import HEADER, TOKEN_DTYPES, IndexedCorpus
from megatron_ltd.data.corpus.manifest import check_manifest, read_manifest
from megatron_ltd.errors import DataError
from tests.data.corpora import described, random_sentences, write_sentences

MUTANTS = 100_000
WORDS = (0, 1, 2, 3, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)

Mutation = Callable[[random.Random, bytearray], None]


def flip(source: random.Random, data: bytearray) -> None:
    for _ in range(source.choice((1, 1, 1, 2, 4, 16))):
        data[source.randrange(len(data))] ^= source.randrange(1, 256)


def flip_in_header(source: random.Random, data: bytearray) -> None:
    data[source.randrange(HEADER.size)] ^= source.randrange(1, 256)


def set_token_type(source: random.Random, data: bytearray) -> None:
    data[17] = source.randrange(12)


def set_count(source: random.Random, data: bytearray) -> None:
    """Both counts, the size of the file kept if it happens so."""
    for at in source.sample((18, 26), source.choice((1, 2))):
        now, = struct.unpack_from("<Q", data, at)
        struct.pack_into("<Q", data, at, source.choice((*WORDS, (now + source.randint(-3, 3)) % 2**64)))


def set_number(source: random.Random, data: bytearray) -> None:
    form, size = source.choice((("<I", 4), ("<Q", 8)))
    at = HEADER.size + 4 * source.randrange((len(data) - HEADER.size) // 4 - 1)
    now, = struct.unpack_from(form, data, at)
    small = (now + source.choice((-8, -2, -1, 1, 2, 8))) % 2**(8 * size)
    struct.pack_into(form, data, at, source.choice((*WORDS, small)) % 2**(8 * size))


def swap(source: random.Random, data: bytearray) -> None:
    size = source.choice((1, 4, 8, 12))
    one, other = (source.randrange(len(data) - size) for _ in range(2))
    data[one:one + size], data[other:other + size] = data[other:other + size], data[one:one + size]


def copy(source: random.Random, data: bytearray) -> None:
    size = source.randrange(1, 40)
    one, other = (source.randrange(len(data) - size) for _ in range(2))
    data[one:one + size] = data[other:other + size]


def cut(source: random.Random, data: bytearray) -> None:
    del data[source.randrange(len(data)):]


def take_out(source: random.Random, data: bytearray) -> None:
    at = source.randrange(len(data))
    del data[at:at + source.choice((1, 4, 8, 12, 20))]


def put_in(source: random.Random, data: bytearray) -> None:
    at = source.randrange(len(data) + 1)
    data[at:at] = source.randbytes(source.choice((1, 4, 8, 12, 20)))


MUTATIONS: tuple[Mutation, ...] = (flip, flip_in_header, set_token_type, set_count, set_number, swap, copy, cut,
                                   take_out, put_in)


class Bench:
    """A corpus whose index is replaced again and again; `before` is what it serves unharmed."""

    def __init__(self, prefix: Path, seed: int, vocab_size: int):
        corpus = write_sentences(prefix, random_sentences(seed, 6, 4, 9, vocab_size), vocab_size)
        described(corpus, "digest", vocab_size)
        self.prefix = str(prefix)
        self.index = prefix.with_suffix(".idx").read_bytes()
        self.before = self.served(corpus)
        self._fd = os.open(prefix.with_suffix(".idx"), os.O_RDWR)

    def served(self, corpus: IndexedCorpus) -> list[int]:
        return corpus.read_sequences(0, len(corpus)).tolist() if len(corpus) else []

    def opened(self, index: bytes) -> IndexedCorpus | None:
        """The corpus with this index, None where it is refused."""
        os.ftruncate(self._fd, len(index))
        os.pwrite(self._fd, index, 0)
        try:
            return IndexedCorpus(self.prefix)
        except DataError:
            return None

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[list[Bench]]:
    room = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=room))
    made = [Bench(folder / str(seed), seed, size) for seed, size in enumerate((300, 32000, 65499, 100000))]
    yield made
    for bench in made:
        bench.close()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_a_hundred_thousand_damaged_indices_crash_nothing_and_serve_no_other_token(benches: list[Bench]) -> None:
    source, accepted, refused = random.Random(11), 0, 0
    for number in range(MUTANTS):
        bench = benches[number % len(benches)]
        data = bytearray(bench.index)
        for _ in range(source.choice((1, 1, 2))):
            if len(data) > 80:
                source.choice(MUTATIONS)(source, data)
        corpus = bench.opened(bytes(data))
        if corpus is None:
            refused += 1
            continue
        if bytes(data) == bench.index:
            continue
        accepted += 1
        # A token type of the same size with a sign gives ids below 0 where it gives others, and these no one serves.
        assert [token % 2**(8 * corpus.dtype.itemsize) for token in bench.served(corpus)] == bench.before
        assert bench.served(corpus) == bench.before or min(bench.served(corpus)) < 0
        assert corpus.document_indices[0] == 0 and corpus.document_indices[-1] == len(corpus)
        with pytest.raises(DataError, match="is not the file that was written"):
            check_manifest(corpus, "digest")
    assert refused > 0.8 * MUTANTS and accepted > 100


def test_every_change_of_one_byte_of_the_index_is_caught_where_there_is_a_manifest(benches: list[Bench]) -> None:
    bench = benches[1]
    assert read_manifest(bench.prefix) is not None and bench.index[17] in TOKEN_DTYPES
    for position in range(len(bench.index)):
        for change in range(1, 256) if position < HEADER.size else (1, 2, 4, 8, 16, 32, 64, 128, 255):
            data = bytearray(bench.index)
            data[position] ^= change
            corpus = bench.opened(bytes(data))
            if corpus is not None:
                with pytest.raises(DataError, match="is not the file that was written"):
                    check_manifest(corpus, None)
    whole = bench.opened(bench.index)
    assert whole is not None and check_manifest(whole, "digest") is not None
