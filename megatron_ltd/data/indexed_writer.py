"""Writes a corpus in the format of `indexed.py`, byte for byte as Megatron does.

Both files grow under `*.partial` names and get their own names only in `close`, flushed to disk and complete. So a
corpus is there as a whole or not at all, whatever ends the process; a later run replaces partial files left by a kill.
"""

import fcntl
import os
from array import array
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ltd.data.indexed import HEADER, MAGIC, TOKEN_DTYPES, VERSION
from megatron_ltd.errors import DataError

_LARGEST_LENGTH = np.iinfo(np.int32).max


def dtype_for_vocab(vocab_size: int | None) -> np.dtype[Any]:
    """The token type that Megatron chooses: uint16 below 65,500 tokens, otherwise int32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < 65500 else np.dtype("<i4")


class IndexedCorpusWriter:
    """Appends documents; use as a context manager, which publishes on success and removes everything on failure.

    Args:
        prefix: path of the two files without `.bin` and `.idx`; missing folders are made, an old corpus is replaced.
        vocab_size: token ids must be below it, and it decides the token type.
        dtype: token type, where the vocabulary should not decide.

    Raises:
        DataError: a token id that the vocabulary or the type does not have, or a file that cannot be written.
    """

    def __init__(self, prefix: str, vocab_size: int | None = None, dtype: np.dtype[Any] | None = None):
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<") if dtype is not None else dtype_for_vocab(vocab_size)
        if self.dtype not in TOKEN_DTYPES.values():
            raise ValueError(f"{self.dtype} is no token type of the format")
        largest = int(np.iinfo(self.dtype).max)
        self._largest_id = largest if vocab_size is None else min(largest, vocab_size - 1)
        self._lengths = array("i")
        self._documents = array("q", [0])
        self.tokens = 0
        folder = os.path.dirname(prefix) or "."
        self._folder = folder
        try:
            os.makedirs(folder, exist_ok=True)
            self._bin = _open_partial(f"{prefix}.bin.partial")
        except OSError as error:
            raise DataError(f"{prefix}.bin cannot be written: {error}. Choose another --output-prefix.") from error

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
        self._write(self._bin, self._checked(ids))
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._documents.frombytes((self._documents[-1] + np.cumsum(sequences)).astype(np.int64).tobytes())
        self.tokens += len(ids)

    def close(self) -> None:
        """Completes both files and gives them their names."""
        try:
            self._sync(self._bin)
            with _open_partial(f"{self.prefix}.idx.partial") as stream:
                self._write_index(stream)
                self._sync(stream)
                if os.path.exists(f"{self.prefix}.idx"):
                    os.unlink(f"{self.prefix}.idx")  # an old index must never stand beside the new tokens
                os.replace(f"{self.prefix}.bin.partial", f"{self.prefix}.bin")
                os.replace(f"{self.prefix}.idx.partial", f"{self.prefix}.idx")
            self._bin.close()
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise DataError(f"{self.prefix} cannot be written: {error}.") from error

    def abort(self) -> None:
        """Removes what was written."""
        for path in (f"{self.prefix}.bin.partial", f"{self.prefix}.idx.partial"):
            if os.path.exists(path):
                os.unlink(path)
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

    def _write(self, stream: BinaryIO, values: NDArray[Any] | bytes) -> None:
        try:
            stream.write(values.tobytes() if isinstance(values, np.ndarray) else values)
        except OSError as error:
            raise DataError(f"{self.prefix} cannot be written: {error}.") from error

    def _write_index(self, stream: BinaryIO) -> None:
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self.dtype)
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        self._write(stream, HEADER.pack(MAGIC, VERSION, code, len(lengths), len(self._documents)))
        self._write(stream, lengths.astype("<i4", copy=False))
        self._write(stream, pointers)
        self._write(stream, np.frombuffer(self._documents, dtype=np.int64).astype("<i8", copy=False))

    @staticmethod
    def _sync(stream: BinaryIO) -> None:
        stream.flush()
        os.fsync(stream.fileno())


def _open_partial(path: str) -> BinaryIO:
    """An empty file that only this process writes."""
    stream = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "wb")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise DataError(f"{path} is being written by another process. Wait for it, or choose another "
                        "prefix.") from error
    if not os.path.exists(path) or os.fstat(stream.fileno()).st_ino != os.stat(path).st_ino:
        stream.close()
        raise DataError(f"{path} was just published by another process. Choose another prefix.")
    stream.truncate(0)
    return stream
