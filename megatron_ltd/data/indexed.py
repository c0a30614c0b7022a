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

Every field is checked when the corpus is opened, so that a damaged file is refused before a token is served. Tokens
are read with `pread`, and a short read is an error: a memory map would kill the process if the file shrank.
"""

import hashlib
import os
import struct
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES = {code: np.dtype(name) for code, name in
                {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}

_SCAN_TOKENS = 1 << 20
_SPAN_TOKENS = 1 << 13

TokenArray = NDArray[np.integer[Any]]


class IndexedCorpus:
    """An opened corpus; safe to read from several threads.

    Args:
        prefix: path of the two files without `.bin` and `.idx`.

    Attributes:
        sequence_lengths: tokens of each sequence, int32.
        document_indices: sequences before each document, int64, one more than documents.
        dtype: type of a token on disk.
        tokens: tokens in all sequences.
        index_sha256: SHA-256 of `.idx`.
        content_digest: SHA-256 of the bytes of `.idx` and the size of `.bin`.

    Raises:
        DataError: a file is missing, damaged, or does not match the other.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self._bin_path, self._idx_path = f"{prefix}.bin", f"{prefix}.idx"
        for path in (self._idx_path, self._bin_path):
            if not os.path.isfile(path):
                raise DataError(f"Corpus {prefix}: no file {path}. {_hint(prefix)}")
        self._hash = hashlib.sha256()
        try:
            with open(self._idx_path, "rb") as stream:
                self._read_index(stream)
            self._fd = os.open(self._bin_path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._fd)
            bin_bytes = os.fstat(self._fd).st_size
        except OSError as error:
            raise DataError(f"Corpus {prefix} cannot be read: {error}.") from error
        self.tokens = int(self.sequence_lengths.sum(dtype=np.int64))
        expected_bytes = self.tokens * self.dtype.itemsize
        if bin_bytes != expected_bytes:
            raise _damaged(self._bin_path, min(bin_bytes, expected_bytes),
                           f"a file of {expected_bytes} bytes ({self.tokens} tokens of {self.dtype.itemsize} bytes, "
                           f"as {self._idx_path} says)", f"{bin_bytes} bytes")
        self.index_sha256 = self._hash.hexdigest()
        self._hash.update(struct.pack("<Q", bin_bytes))
        self.content_digest = self._hash.hexdigest()

    def __len__(self) -> int:
        """Sequences in the corpus."""
        return len(self.sequence_lengths)

    def read(self, index: int, offset: int = 0, length: int | None = None) -> TokenArray:
        """Tokens of one sequence from `offset` on: `length` of them, or all."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        available = int(self.sequence_lengths[index])
        length = available - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(f"tokens [{offset}, {offset + length}) of the {available} in sequence {index} of "
                             f"{self.prefix}")
        return self._read_tokens(int(self._pointers[index]) // self.dtype.itemsize + offset, length)

    def read_sequences(self, first: int, end: int) -> TokenArray:
        """Tokens of consecutive sequences, back to back."""
        if not 0 <= first < end <= len(self):
            raise IndexError(f"sequences [{first}, {end}) of {len(self)} in {self.prefix}")
        tokens = int(self.sequence_lengths[first:end].sum(dtype=np.int64))
        return self._read_tokens(int(self._pointers[first]) // self.dtype.itemsize, tokens)

    def token_id_range(self, spans: int | None = None) -> tuple[int, int]:
        """Smallest and largest token id: of the whole corpus, or of so many spans of 8,192 tokens spread evenly
        from its first token to its last. (0, 0) for a corpus without tokens."""
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

    def _read_tokens(self, first: int, count: int) -> TokenArray:
        """Tokens [first, first + count) of `.bin`."""
        start_bytes, size_bytes = first * self.dtype.itemsize, count * self.dtype.itemsize
        data = b""
        while len(data) < size_bytes:
            try:
                more = os.pread(self._fd, size_bytes - len(data), start_bytes + len(data))
            except OSError as error:
                raise DataError(f"{self._bin_path}, byte {start_bytes + len(data)}: {error}.") from error
            if not more:
                raise _damaged(self._bin_path, start_bytes + len(data),
                               f"{size_bytes} bytes from byte {start_bytes}", f"{len(data)}; the file has shrunk")
            data = data + more if data else more
        return np.frombuffer(data, dtype=self.dtype)

    def _read_index(self, stream: BinaryIO) -> None:
        """Reads and checks all of `.idx`."""
        path, idx_bytes = self._idx_path, os.fstat(stream.fileno()).st_size
        header = stream.read(HEADER.size)
        self._hash.update(header)
        if len(header) < HEADER.size:
            raise _damaged(path, len(header), f"a header of {HEADER.size} bytes", f"a file of {len(header)} bytes")
        magic, version, code, sequences, boundaries = HEADER.unpack(header)
        if magic != MAGIC:
            raise _damaged(path, 0, f"{MAGIC!r}", f"{magic!r}")
        if version != VERSION:
            raise _damaged(path, 9, f"version {VERSION}", f"{version}")
        if code not in TOKEN_DTYPES:
            raise _damaged(path, 17, f"the code of an integer type, one of {sorted(TOKEN_DTYPES)}", f"{code}")
        if boundaries < 1:
            raise _damaged(path, 26, "at least 1 document boundary", "0")
        expected_bytes = HEADER.size + 12 * sequences + 8 * boundaries
        if idx_bytes != expected_bytes:
            found = f"{idx_bytes} bytes" + (" (multimodal corpora are not supported)"
                                            if idx_bytes == expected_bytes + sequences else "")
            raise _damaged(path, min(idx_bytes, expected_bytes), f"a file of {expected_bytes} bytes for {sequences} "
                           f"sequences and {boundaries} document boundaries", found)
        self.dtype = TOKEN_DTYPES[code]
        self.sequence_lengths: NDArray[np.int32] = self._read_array(stream, "<i4", sequences)
        self._pointers: NDArray[np.int64] = self._read_array(stream, "<i8", sequences)
        self.document_indices: NDArray[np.int64] = self._read_array(stream, "<i8", boundaries)
        self._check_arrays()

    def _read_array(self, stream: BinaryIO, dtype: str, count: int) -> NDArray[Any]:
        start_bytes = stream.tell()
        array = np.fromfile(stream, dtype=dtype, count=count)
        if len(array) != count:
            raise _damaged(self._idx_path, start_bytes, f"{count} numbers of type {dtype}", f"{len(array)}")
        self._hash.update(array.view(np.uint8).data)
        array.flags.writeable = False
        return array

    def _check_arrays(self) -> None:
        lengths, pointers, documents = self.sequence_lengths, self._pointers, self.document_indices
        lengths_at = HEADER.size
        pointers_at = lengths_at + lengths.nbytes
        documents_at = pointers_at + pointers.nbytes
        if (bad := _first(lengths < 0)) is not None:
            raise _damaged(self._idx_path, lengths_at + 4 * bad, f"a length >= 0 for sequence {bad}", f"{lengths[bad]}")
        expected = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=expected[1:])
        expected *= self.dtype.itemsize
        if (bad := _first(pointers != expected)) is not None:
            raise _damaged(self._idx_path, pointers_at + 8 * bad,
                           f"sequence {bad} to start at byte {expected[bad]}", f"{pointers[bad]}")
        if documents[0] != 0:
            raise _damaged(self._idx_path, documents_at, "the first document to start at sequence 0", f"{documents[0]}")
        if (bad := _first(documents[1:] < documents[:-1])) is not None:
            raise _damaged(self._idx_path, documents_at + 8 * (bad + 1),
                           f"document {bad} to end at sequence {documents[bad]} or later", f"{documents[bad + 1]}")
        if documents[-1] != len(lengths):
            raise _damaged(self._idx_path, documents_at + 8 * (len(documents) - 1),
                           f"the last document to end at sequence {len(lengths)}", f"{documents[-1]}")


def _first(bad: NDArray[np.bool_]) -> int | None:
    """Position of the first True."""
    return int(bad.argmax()) if bad.any() else None


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
