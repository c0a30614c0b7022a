"""Writes a corpus in the format of `indexed.py`, byte for byte as Megatron does.

Both files grow under `*.partial` names and get their own names only in `close`, flushed to disk and complete. So a
corpus exists as a whole or not at all, however the process ends; a later run replaces partial files left by a kill, or
continues from the last `mark` (two more partial files then hold what is not in `.bin`).
"""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ltd.data.corpus.indexed import HEADER, MAGIC, TOKEN_DTYPES, VERSION
from megatron_ltd.data.corpus.manifest import FileFacts, Manifest, SourceFacts, manifest_path
from megatron_ltd.data.corpus.partial_files import (
    open_partial,
    partial_files,
    publish_corpus,
    remove,
    side_files,
    sync,
    writing,
)
from megatron_ltd.errors import DataError

_CHUNK_BYTES = 1 << 22
_LARGEST_LENGTH = np.iinfo(np.int32).max


def dtype_for_vocab(vocab_size: int | None) -> np.dtype[Any]:
    """The token type that Megatron chooses: uint16 below 65,500 tokens, otherwise int32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True)
class Mark:
    """The part of a corpus that is safe on disk: its sizes, and the SHA-256 of the bytes of `.bin` so far."""

    tokens: int
    sequences: int
    documents: int
    bin_sha256: str


class IndexedCorpusWriter:
    """Appends documents; use as a context manager, which publishes on success and removes everything on failure.

    Args:
        prefix: path of the two files without `.bin` and `.idx`; missing folders are made, an old corpus is replaced.
        vocab_size: token ids must be below it, and it decides the token type.
        dtype: token type, if the vocabulary should not decide.
        resume: continue from here with the partial files of an earlier writer.

    Attributes:
        keep: leave the partial files after a failure, for a later writer to continue.

    Raises:
        DataError: a token id that the vocabulary or the type does not have, or a file that cannot be written.
    """

    def __init__(self, prefix: str, vocab_size: int | None = None, dtype: np.dtype[Any] | None = None,
                 resume: Mark | None = None):
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<") if dtype is not None else dtype_for_vocab(vocab_size)
        if self.dtype not in TOKEN_DTYPES.values():
            raise ValueError(f"{self.dtype} is no token type of the format")
        largest = int(np.iinfo(self.dtype).max)
        self._largest_id = largest if vocab_size is None else min(largest, vocab_size - 1)
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._marked = (0, 1)  # of those, how many the side files hold
        self.tokens = 0
        self.keep = False
        self._hash = hashlib.sha256()
        self._finished: FileFacts | None = None
        with writing(f"{prefix}.bin", " Choose another --output."):
            os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
            self._bin = open_partial(f"{prefix}.bin.partial")
            kept = () if resume is None else side_files(prefix)
            remove(*(path for path in partial_files(prefix)[1:] if path not in kept))
            if resume is None:
                self._bin.truncate(0)
            else:
                self._resume(resume)

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._documents) - 1

    @property
    def sequences(self) -> int:
        """Sequences added so far."""
        return len(self._lengths)

    def add_document(self, tokens: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """Appends one document.

        Args:
            tokens: all its tokens.
            lengths: tokens of each of its sequences. Default: one sequence, or none if there is no token.
        """
        ids = np.asarray(tokens)
        lengths = ([len(ids)] if len(ids) else []) if lengths is None else lengths
        self.add_documents(ids, lengths, [np.size(lengths)])

    def add_documents(self, tokens: ArrayLike, lengths: ArrayLike, sequences: ArrayLike) -> None:
        """Appends several documents at once.

        Args:
            tokens: tokens of all documents, back to back.
            lengths: tokens of each sequence.
            sequences: sequences of each document, which may be 0.
        """
        ids = np.asarray(tokens)
        lengths = np.asarray(lengths, dtype=np.int64)
        sequences = np.asarray(sequences, dtype=np.int64)
        if lengths.sum() != len(ids) or sequences.sum() != len(lengths):
            raise ValueError(f"{len(ids)} tokens in sequences of {lengths.sum()}, {len(lengths)} sequences in "
                             f"documents of {sequences.sum()}")
        if len(lengths) and (lengths.min() < 0 or lengths.max() > _LARGEST_LENGTH):
            raise DataError(f"{self.prefix}: a sequence of {lengths.max()} tokens; the format holds at most "
                            f"{_LARGEST_LENGTH} in one. Split the document.")
        data = self._checked(ids).tobytes()
        with writing(self.prefix):
            self._bin.write(data)
        self._hash.update(data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._documents.frombytes((self._documents[-1] + np.cumsum(sequences)).astype(np.int64).tobytes())
        self.tokens += len(ids)

    def mark(self) -> Mark:
        """Brings all that was added to disk; a later writer can continue from here."""
        with writing(self.prefix):
            sync(self._bin)
            for path, values, first in zip(side_files(self.prefix), (self._lengths, self._documents), self._marked,
                                           strict=True):
                with open(path, "r+b" if os.path.exists(path) else "wb") as stream:
                    stream.seek(first * values.itemsize)
                    stream.truncate()
                    stream.write(memoryview(values)[first:])
                    sync(stream)
        self._marked = (len(self._lengths), len(self._documents))
        return Mark(self.tokens, self.sequences, self.documents, self._hash.hexdigest())

    def describe(self, tokenizer: str | None, vocab_size: int | None, settings: dict[str, Any],
                 sources: Sequence[SourceFacts]) -> None:
        """Completes both files under their partial names, and writes the manifest to be published with them."""
        bin_facts = FileFacts(self.tokens * self.dtype.itemsize, self._hash.hexdigest())
        manifest = Manifest(bin_facts, self._finish(), self.dtype.name, self.documents, self.sequences, self.tokens,
                            tokenizer, vocab_size, settings, tuple(sources))
        path = manifest_path(self.prefix)
        with writing(path), open(f"{path}.partial", "wb") as stream:
            stream.write(manifest.to_bytes())
            sync(stream)

    def close(self) -> None:
        """Completes both files and gives them their names."""
        self._finish()
        publish_corpus(self.prefix)
        self._bin.close()

    def abort(self) -> None:
        """Removes what was written, unless it is to be kept."""
        if not self.keep:
            remove(*partial_files(self.prefix))
        with suppress(OSError):  # about what the buffer still held, which is of no use
            self._bin.close()

    def __enter__(self) -> "IndexedCorpusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise

    def _checked(self, ids: NDArray[Any]) -> NDArray[Any]:
        """The ids in the token type of the file."""
        if not len(ids):
            return np.empty(0, dtype=self.dtype)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, not {ids.dtype}")
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest > self._largest_id:
            bad = smallest if smallest < 0 else largest
            raise DataError(f"{self.prefix}: token id = {bad} is outside [0, {self._largest_id}], the ids that the "
                            f"vocabulary and the token type {self.dtype.name} have. Use the tokenizer that made the "
                            "ids.")
        return ids.astype(self.dtype, copy=False)

    def _finish(self) -> FileFacts:
        """Completes both files under their partial names; facts of `.idx`."""
        if self._finished is None:
            digest, size = hashlib.sha256(), 0
            with writing(self.prefix):
                sync(self._bin)
                with open_partial(f"{self.prefix}.idx.partial") as stream:
                    stream.truncate(0)
                    for part in self._index():
                        size += stream.write(part)
                        digest.update(part)
                    sync(stream)
            self._finished = FileFacts(size, digest.hexdigest())
        return self._finished

    def _index(self) -> Iterator[bytes]:
        """The parts of `.idx`."""
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self.dtype)
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        documents = np.frombuffer(self._documents, dtype=np.int64)
        yield HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
        yield lengths.astype("<i4").tobytes()
        yield pointers.tobytes()
        yield documents.astype("<i8").tobytes()

    def _resume(self, mark: Mark) -> None:
        """Reads back what was marked and drops what came after it."""
        sizes = (mark.sequences, mark.documents + 1)
        arrays = (self._lengths, self._documents)
        del self._documents[:]
        for path, values, size in zip(side_files(self.prefix), arrays, sizes, strict=True):
            if os.path.exists(path):
                with open(path, "rb") as stream:
                    values.frombytes(stream.read(size * values.itemsize))
        left = mark.tokens * self.dtype.itemsize
        while left and (data := self._bin.read(min(left, _CHUNK_BYTES))):
            self._hash.update(data)
            left -= len(data)
        if (left or self._hash.hexdigest() != mark.bin_sha256 or tuple(map(len, arrays)) != sizes
                or np.frombuffer(self._lengths, dtype=np.int32).sum(dtype=np.int64) != mark.tokens
                or self._documents[-1] != mark.sequences):
            raise DataError(f"{self.prefix}: partial files of the interrupted run are missing or damaged. Run again "
                            "without --resume.")
        self._bin.seek(mark.tokens * self.dtype.itemsize)
        self._bin.truncate()
        self.tokens, self._marked, self.keep = mark.tokens, sizes, True
