"""Reads a Megatron corpus: `{prefix}.bin` is token ids back to back, `{prefix}.idx` says where sequences begin.

Layout of `.idx`, little-endian, S sequences and D = documents + 1 boundaries:

    offset     bytes  field
    0          9      b"MMIDIDX" and two zero bytes
    9          8      version, 1
    17         1      code of the token type
    18         8      S
    26         8      D
    34         4 S    tokens of each sequence, int32
    34 + 4 S   8 S    where each sequence starts in .bin, in bytes, int64
    34 + 12 S  8 D    number of sequences before each document, from 0 to S, int64

Every field is checked when the corpus is opened, so that a damaged file is rejected before a token is served; with a
cache folder once, and again when a file has changed. A large `.idx` is mapped, so that the processes of a machine share
its memory. Tokens are read with `pread`, and a short read is an error: a map would kill the process if the file shrank.
"""

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.corpus.open_files import ReadFile, whole_file
from megatron_ltd.data.corpus.seals import read_seal, state_of, write_seal
from megatron_ltd.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES = {code: np.dtype(name) for code, name in
                {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}

_CHUNK = 1 << 15  # numbers that are read and checked at once, so that memory is little more than what is kept
_SCAN_TOKENS = 1 << 20
_SPAN_TOKENS = 1 << 13

TokenArray = NDArray[np.integer[Any]]


class IndexedCorpus:
    """An opened corpus; safe to read from several threads.

    Args:
        prefix: path of the two files without `.bin` and `.idx`.
        cache_path: --data-cache-path, where it is noted that the files were found sound; None checks them every time.

    Attributes:
        sequence_lengths: tokens of each sequence, int32.
        document_indices: sequences before each document, int64, one more than documents.
        documents: how many there are.
        dtype: type of a token on disk.
        tokens: tokens in all sequences.
        index_sha256: SHA-256 of `.idx`.
        content_digest: SHA-256 of the bytes of `.idx` and the size of `.bin`.

    Raises:
        DataError: a file is missing, damaged, or does not match the other.
    """

    def __init__(self, prefix: str, cache_path: str | None = None):
        self.prefix = prefix
        self._bin_path, self._idx_path = f"{prefix}.bin", f"{prefix}.idx"
        for path in (self._idx_path, self._bin_path):
            if not os.path.isfile(path):
                raise DataError(f"Corpus {prefix}: no file {path}. {_hint(prefix)}")
        try:
            with open(self._idx_path, "rb") as stream:
                states = [state_of(os.fstat(stream.fileno()))]
                data = whole_file(stream.fileno())
            self._open_index(data)
            self._bin = ReadFile(self._bin_path)
            states.append(self._bin.state)
            name = hashlib.sha256(os.path.realpath(self._idx_path).encode(errors="surrogateescape")).hexdigest()[:32]
            facts = None if cache_path is None else read_seal(cache_path, name, states)
            if facts is None:
                facts = self._check(data)
                if cache_path is not None:
                    write_seal(cache_path, name, states, facts)
        except OSError as error:
            raise DataError(f"Corpus {prefix} cannot be read: {error}.") from error
        self.index_sha256, self.content_digest = facts["index_sha256"], facts["content_digest"]

    def __len__(self) -> int:
        """Sequences in the corpus."""
        return len(self.sequence_lengths)

    def tokens_of(self, sequences: range) -> int:
        """Tokens of consecutive sequences."""
        starts = [self._pointers.item(i) // self._token_bytes if i < len(self) else self.tokens
                  for i in (sequences.start, sequences.stop)]
        return starts[1] - starts[0]

    def read(self, index: int, offset: int = 0, length: int | None = None) -> TokenArray:
        """Tokens of one sequence from `offset` on: `length` of them, or all."""
        if not 0 <= index < len(self.sequence_lengths):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        available = self.sequence_lengths.item(index)
        length = available - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(f"tokens [{offset}, {offset + length}) of the {available} in sequence {index} of "
                             f"{self.prefix}")
        size = self._token_bytes
        return self._read_bytes(self._pointers.item(index) + offset * size, length * size)

    def read_sequences(self, first: int, end: int) -> TokenArray:
        """Tokens of consecutive sequences, back to back."""
        if not 0 <= first < end <= len(self):
            raise IndexError(f"sequences [{first}, {end}) of {len(self)} in {self.prefix}")
        tokens = int(self.sequence_lengths[first:end].sum(dtype=np.int64))
        return self._read_tokens(int(self._pointers[first]) // self._token_bytes, tokens)

    def token_id_range(self, spans: int | None = None) -> tuple[int, int]:
        """Smallest and largest token id, (0, 0) for a corpus without tokens.

        Args:
            spans: read only so many spans of 8,192 tokens, spread evenly over the corpus; None: read all of it.
        """
        if spans is None or spans * _SPAN_TOKENS >= self.tokens:
            starts, count = list(range(0, self.tokens, _SCAN_TOKENS)), _SCAN_TOKENS
        else:
            last = self.tokens - _SPAN_TOKENS
            starts, count = [last * i // max(spans - 1, 1) for i in range(spans)], _SPAN_TOKENS
        smallest, largest = [], []
        for start in starts:
            ids = self._read_tokens(start, min(count, self.tokens - start))
            smallest.append(int(ids.min()))
            largest.append(int(ids.max()))
        return min(smallest, default=0), max(largest, default=0)

    def check_ids(self, ids: NDArray[np.integer[Any]], vocab_size: int) -> None:
        """Raises DataError where ids of this corpus are outside [0, vocab_size)."""
        largest = int(ids.max())
        bad = largest if largest >= vocab_size or self.dtype.kind == "u" else int(ids.min())
        if not 0 <= bad < vocab_size:
            raise DataError(f"Corpus {self.prefix} holds token id = {bad}, and the tokenizer has ids in "
                            f"[0, {vocab_size}). Use the tokenizer with which the corpus was written; if this is it, "
                            f"{self.prefix}.bin is damaged.")

    def _read_tokens(self, first: int, count: int) -> TokenArray:
        """Tokens [first, first + count) of `.bin`."""
        return self._read_bytes(first * self._token_bytes, count * self._token_bytes)

    def _read_bytes(self, start_bytes: int, size_bytes: int) -> TokenArray:
        data = self._bin.read(start_bytes, size_bytes) if size_bytes else b""
        if len(data) < size_bytes:
            raise _damaged(self._bin_path, start_bytes + len(data), f"{size_bytes} bytes from byte {start_bytes}",
                           f"{len(data)}; the file has shrunk")
        return np.frombuffer(data, dtype=self.dtype)

    def _check(self, data: mmap.mmap | bytes) -> dict[str, str]:
        """Checks the files in full; their digests."""
        digest = self._check_index(data)
        bin_bytes, expected_bytes = self._bin.size_bytes, self.tokens * self._token_bytes
        if bin_bytes != expected_bytes:
            raise _damaged(self._bin_path, min(bin_bytes, expected_bytes),
                           f"a file of {expected_bytes} bytes ({self.tokens} tokens of {self._token_bytes} bytes, "
                           f"as {self._idx_path} says)", f"{bin_bytes} bytes")
        index_sha256 = digest.hexdigest()
        digest.update(struct.pack("<Q", bin_bytes))
        return {"index_sha256": index_sha256, "content_digest": digest.hexdigest()}

    def _open_index(self, data: mmap.mmap | bytes) -> None:
        """Takes the header and the arrays of `.idx`."""
        path = self._idx_path
        if len(data) < HEADER.size:
            raise _damaged(path, len(data), f"a header of {HEADER.size} bytes", f"a file of {len(data)} bytes")
        magic, version, code, sequences, boundaries = HEADER.unpack_from(data)
        for offset_bytes, sound, expected, found in (
                (0, magic == MAGIC, f"{MAGIC!r}", magic), (9, version == VERSION, f"version {VERSION}", version),
                (17, code in TOKEN_DTYPES, f"the code of an integer type, one of {sorted(TOKEN_DTYPES)}", code),
                (26, boundaries >= 1, "at least 1 document boundary", boundaries)):
            if not sound:
                raise _damaged(path, offset_bytes, expected, f"{found}")
        expected_bytes = HEADER.size + 12 * sequences + 8 * boundaries
        if len(data) != expected_bytes:
            found = f"{len(data)} bytes" + (" (multimodal corpora are not supported)"
                                            if len(data) == expected_bytes + sequences else "")
            raise _damaged(path, min(len(data), expected_bytes), f"a file of {expected_bytes} bytes for {sequences} "
                           f"sequences and {boundaries} document boundaries", found)
        self.dtype, self.documents = TOKEN_DTYPES[code], boundaries - 1
        self._token_bytes = self.dtype.itemsize
        self.sequence_lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
        self._pointers = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
        self.document_indices = np.frombuffer(data, "<i8", boundaries, HEADER.size + 12 * sequences)
        last = (int(self._pointers[-1]), int(self.sequence_lengths[-1])) if sequences else (0, 0)
        self.tokens = last[0] // self._token_bytes + last[1]

    def _check_index(self, data: mmap.mmap | bytes) -> "hashlib._Hash":
        """Checks all of `.idx`; the SHA-256 of its bytes."""
        digest = hashlib.sha256(data[:HEADER.size])
        for part, start_bytes, begin in self._parts(self.sequence_lengths, HEADER.size, digest):
            if (bad := _first(part < 0)) is not None:
                raise _damaged(self._idx_path, start_bytes + 4 * bad, f"a length >= 0 for sequence {begin + bad}",
                               f"{part[bad]}")
        tokens = 0
        for part, start_bytes, begin in self._parts(self._pointers, HEADER.size + 4 * len(self), digest):
            lengths = self.sequence_lengths[begin:begin + len(part)]
            expected = np.cumsum(lengths, dtype=np.int64)
            tokens_here = int(expected[-1])
            expected += tokens
            expected -= lengths
            expected *= self._token_bytes
            if (bad := _first(part != expected)) is not None:
                raise _damaged(self._idx_path, start_bytes + 8 * bad,
                               f"sequence {begin + bad} to start at byte {expected[bad]}", f"{part[bad]}")
            tokens += tokens_here
        self._check_boundaries(digest)
        return digest

    def _check_boundaries(self, digest: "hashlib._Hash") -> None:
        last, start = 0, HEADER.size + 12 * len(self)
        for part, start_bytes, begin in self._parts(self.document_indices, start, digest):
            if begin == 0 and part[0] != 0:
                raise _damaged(self._idx_path, start_bytes, "the first document to start at sequence 0", f"{part[0]}")
            bad = 0 if part[0] < last else _first(part[1:] < part[:-1], 1)  # no difference: that may overflow
            if bad is not None:
                raise _damaged(self._idx_path, start_bytes + 8 * bad, f"document {begin + bad - 1} to end at sequence "
                               f"{part[bad - 1] if bad else last} or later", f"{part[bad]}")
            last = int(part[-1])
        if last != len(self):
            raise _damaged(self._idx_path, start + 8 * self.documents, f"the last document to end at sequence "
                           f"{len(self)}", f"{last}")

    def _parts(self, numbers: NDArray[Any], start_bytes: int, digest: "hashlib._Hash"
               ) -> Iterator[tuple[NDArray[Any], int, int]]:
        """Digests an array of `.idx` part by part; each with its byte in the file and the number of its first entry."""
        for begin in range(0, len(numbers), _CHUNK):
            part = numbers[begin:begin + _CHUNK].copy()  # a map of a file may change between two looks at it
            digest.update(part.data)
            yield part, start_bytes + begin * part.itemsize, begin


def _first(bad: NDArray[np.bool_], begin: int = 0) -> int | None:
    """Position of the first True, counted from `begin`."""
    return begin + int(bad.argmax()) if bad.any() else None


def _damaged(path: str, offset_bytes: int, expected: str, found: str) -> DataError:
    return DataError(f"{path}, byte {offset_bytes}: expected {expected}, found {found}. The corpus is damaged or was "
                     "not fully copied; copy it again, or write it again with tools/preprocess_data.py.")


def _hint(prefix: str) -> str:
    """What the user may have meant by a prefix that names no corpus."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and path.with_suffix(".idx").is_file():
        return f"Give the prefix without {path.suffix}: {path.with_suffix('')}."
    near = sorted(path.parent.glob(f"{path.name}_*.idx")) if path.name and path.parent.is_dir() else []
    if near:
        return f"Did you mean {near[0].with_suffix('')}?"
    return "Give the prefix that tools/preprocess_data.py wrote, such as my-corpus_text_document."
