"""Reads text input, plain, gzip (.gz) or Zstandard (.zst), as a stream of blocks that end where lines end."""

import glob
import hashlib
import os
import select
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Any

from megatron_ltd.data.preprocess.behind import Behind
from megatron_ltd.errors import DataError

_PACKED_BYTES = 1 << 16
_PLAIN_BYTES = 1 << 18
BLOCK_BYTES = 1 << 19
_SIGNAL_SECONDS = 0.5
LARGEST_DOCUMENT_BYTES = 2**31 - 2  # with an end-of-document token it still fits the format's int32 lengths
INPUT_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json", ".txt") for packed in ("", ".gz", ".zst")
                       ) + (".parquet",)


@dataclass(frozen=True)
class Place:
    """Where a document begins in a file: the number of its line (row) from 1, and its (decompressed) byte.

    Attributes:
        digest: SHA-256 of the rows before it, where the input has no file to be known by.
    """

    line: int = 1
    byte: int = 0
    digest: str = ""


START = Place()


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one file, or all of a file that is one document, or rows of a table.

    Attributes:
        first_line: number of its first line, from 1.
        first_byte: where it begins in the (decompressed) file.
        whole: the file is one document.
        columns: of a table, its rows for each key; a text or what else stands there. `data` is empty then.
        end: where the next block begins.
        size_bytes: of its text.
    """

    path: str
    first_line: int
    first_byte: int
    data: bytes
    whole: bool = False
    columns: tuple[tuple[object, ...], ...] | None = None
    end: Place = START
    size_bytes: int = 0

    def lines(self) -> list[bytes]:
        """The lines, without the newlines that end them."""
        lines = self.data.split(b"\n")
        return lines[:-1] if self.data.endswith(b"\n") else lines


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files and pipes named by paths, folders and globs: in the order given, each folder and glob in order of name.

    Of a folder all files whose names end as `INPUT_SUFFIXES` do are taken, also those in folders in it.

    Raises:
        DataError: a path, folder or glob names no file.
    """
    paths: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(pattern, followlinks=True)
                           for name in names if name.endswith(INPUT_SUFFIXES) and not name.startswith("."))
            if not found:
                raise DataError(f"--input = {pattern}: no file in this folder ends in {', '.join(INPUT_SUFFIXES)}.")
        elif os.path.exists(pattern):
            found = [pattern]
        else:
            found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not found:
            raise DataError(f"--input = {pattern}: no such file.")
        paths.extend(found)
    return paths


class TextInput:
    """One input file.

    Attributes:
        size_bytes: size on disk; 0 for a pipe.
        read_bytes: how much of that has been read.
        sha256: of what has been read, as it is on disk.
        whole: a .txt file is one document; everything else is loose JSON, an object a line.
    """

    def __init__(self, path: str):
        self.path = path
        self.size_bytes = os.path.getsize(path)
        self.read_bytes = 0
        self._hash = hashlib.sha256()
        self._kind = os.path.splitext(path)[1]
        plain = path.removesuffix(self._kind) if self._kind in (".gz", ".zst") else path
        self.whole = plain.endswith(".txt")

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def blocks(self, start: Place = START) -> Iterator[Block]:
        """The file in pieces of about 512 KiB, or one line where that is longer.

        Args:
            start: where the first block begins; what is before it is read and left out.

        Raises:
            DataError: the file cannot be read or decompressed, or its end is missing.
        """
        place = start
        pieces: list[bytes] = []
        held_bytes = line_bytes = 0
        for chunk in _without(self._chunks(), start.byte):
            newline = -1 if self.whole else chunk.find(b"\n")
            if line_bytes + (len(chunk) if newline < 0 else newline) > LARGEST_DOCUMENT_BYTES:
                line = place.line + sum(piece.count(b"\n") for piece in pieces)
                raise self._too_long(place if self.whole else Place(line, place.byte + held_bytes - line_bytes))
            pieces.append(chunk)
            held_bytes += len(chunk)
            cut = chunk.rfind(b"\n") + 1
            line_bytes = line_bytes + len(chunk) if newline < 0 else len(chunk) - cut
            if held_bytes < BLOCK_BYTES or not cut or self.whole:
                continue
            pieces[-1] = chunk[:cut]
            block = self._block(place, b"".join(pieces))
            pieces, held_bytes, place = [chunk[cut:]], len(chunk) - cut, block.end
            yield block
            del block  # a long document is not to be held while the next is read
        data = b"".join(pieces)
        pieces.clear()
        if data:
            yield self._block(place, data)

    def _block(self, place: Place, data: bytes) -> Block:
        end = Place(place.line + data.count(b"\n"), place.byte + len(data))
        return Block(self.path, place.line, place.byte, data, self.whole, None, end, len(data))

    def _too_long(self, place: Place) -> DataError:
        return DataError(f"{self.path}:{place.line}:{place.byte}: a {'document' if self.whole else 'line'} of more "
                         f"than {LARGEST_DOCUMENT_BYTES} bytes, the most that one may have. Split it into several "
                         "documents (file:line:byte) and run again; nothing was written.")

    def _chunks(self) -> Iterator[bytes]:
        """The decompressed bytes."""
        decoder: Any = None
        packed = self._kind in (".gz", ".zst")
        try:
            with open(self.path, "rb", buffering=0) as stream, Behind() as behind:
                while raw := _read_when_ready(stream, _PACKED_BYTES if packed else _PLAIN_BYTES):
                    self.read_bytes += len(raw)
                    behind.call(self._hash.update, raw)
                    if not packed:
                        yield raw
                        continue
                    while raw:
                        if decoder is None and self._kind == ".gz":
                            raw = raw.lstrip(b"\0")  # archives may be padded with zeros
                            if not raw:
                                break
                        decoder = decoder or self._decoder()
                        yield decoder.decompress(raw)
                        raw = decoder.unused_data
                        if decoder.eof:
                            decoder = None
        except self._unreadable() as error:
            raise DataError(f"{self.path}, near byte {self.read_bytes}: {error}.") from error
        if decoder is not None:
            raise DataError(f"{self.path}: the compressed file ends at byte {self.size_bytes}, before its end marker. "
                            "It was not fully copied; copy it again.")

    def _decoder(self) -> Any:
        if self._kind == ".gz":
            return zlib.decompressobj(wbits=31)
        return _zstandard(self.path).ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def _unreadable(self) -> tuple[type[Exception], ...]:
        return (OSError, zlib.error, *((_zstandard(self.path).ZstdError,) if self._kind == ".zst" else ()))


def _zstandard(path: str) -> Any:
    """The library, which only .zst files need."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path} needs the package zstandard. Install it: pip install zstandard.") from error
    return zstandard


def _without(chunks: Iterator[bytes], first: int) -> Iterator[bytes]:
    """The bytes from `first` on."""
    for chunk in chunks:
        if first < len(chunk):
            yield chunk[first:] if first else chunk
        first = max(first - len(chunk), 0)


def _read_when_ready(stream: FileIO, most_bytes: int) -> bytes:
    """The next bytes; empty at the end.

    From a pipe that is silent for long, too: a signal that comes between two system calls (or inside a buffered read,
    which is many) would otherwise wait, like the input, for ever.
    """
    while not select.select([stream], [], [], _SIGNAL_SECONDS)[0]:
        continue
    return stream.read(most_bytes) or b""
