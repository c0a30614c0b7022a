"""Reads text input, plain, gzip (.gz) or Zstandard (.zst), as a stream of blocks that end where lines end."""

import glob
import os
import select
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Protocol

from megatron_ltd.errors import DataError

_CHUNK_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 18
_SIGNAL_SECONDS = 0.5


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one file, or all of a file that is one document.

    Attributes:
        first_line: number of its first line, from 1.
        first_byte: where it begins in the (decompressed) file.
        whole: the file is one document.
    """

    path: str
    first_line: int
    first_byte: int
    data: bytes
    whole: bool = False

    def lines(self) -> list[bytes]:
        """The lines, without the newlines that end them."""
        lines = self.data.split(b"\n")
        return lines[:-1] if self.data.endswith(b"\n") else lines


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files and pipes named by paths and globs, in the order given and each glob in order of name.

    Raises:
        DataError: a path or glob names no file.
    """
    paths: list[str] = []
    for pattern in patterns:
        if os.path.exists(pattern) and not os.path.isdir(pattern):
            paths.append(pattern)
            continue
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
        whole: a .txt file is one document; everything else is loose JSON, an object a line.
    """

    def __init__(self, path: str):
        self.path = path
        self.size_bytes = os.path.getsize(path)
        self.read_bytes = 0
        self._kind = os.path.splitext(path)[1]
        plain = path.removesuffix(self._kind) if self._kind in (".gz", ".zst") else path
        self.whole = plain.endswith(".txt")

    def blocks(self) -> Iterator[Block]:
        """The file in pieces of about 256 KiB, or one line where that is longer.

        Raises:
            DataError: the file cannot be read or decompressed, or its end is missing.
        """
        first_line, first_byte = 1, 0
        pieces: list[bytes] = []
        held_bytes = 0
        for chunk in self._chunks():
            pieces.append(chunk)
            held_bytes += len(chunk)
            cut = chunk.rfind(b"\n") + 1
            if held_bytes < _BLOCK_BYTES or not cut or self.whole:
                continue
            pieces[-1] = chunk[:cut]
            data = b"".join(pieces)
            yield Block(self.path, first_line, first_byte, data)
            first_line += data.count(b"\n")
            first_byte += len(data)
            pieces, held_bytes = [chunk[cut:]], len(chunk) - cut
        data = b"".join(pieces)
        if data:
            yield Block(self.path, first_line, first_byte, data, self.whole)

    def _chunks(self) -> Iterator[bytes]:
        """The decompressed bytes."""
        decoder: _Decoder | None = None
        try:
            with open(self.path, "rb", buffering=0) as stream:
                while raw := _read_when_ready(stream):
                    self.read_bytes += len(raw)
                    if self._kind not in (".gz", ".zst"):
                        yield raw
                        continue
                    while raw:
                        if decoder is None and self._kind == ".gz":
                            raw = raw.lstrip(b"\0")  # archives may be padded with zeros
                            if not raw:
                                break
                        decoder = decoder or self._decoder()
                        yield decoder.decompress(raw)
                        raw = b""
                        if decoder.eof:
                            raw, decoder = decoder.unused_data, None
        except _read_errors() as error:
            raise DataError(f"{self.path}, near byte {self.read_bytes}: {error}.") from error
        if decoder is not None:
            raise DataError(f"{self.path}: the compressed file ends at byte {self.size_bytes}, before its end marker. "
                            "It was not fully copied; copy it again.")

    def _decoder(self) -> _Decoder:
        if self._kind == ".gz":
            return zlib.decompressobj(wbits=31)
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{self.path} needs the package zstandard. Install it: pip install zstandard.") from error
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _read_when_ready(stream: FileIO) -> bytes:
    """The next bytes; empty at the end.

    From a pipe that is silent for long, too: a signal that comes between two system calls (or inside a buffered read,
    which is many) would otherwise wait, like the input, for ever.
    """
    while not select.select([stream], [], [], _SIGNAL_SECONDS)[0]:
        continue
    return stream.read(_CHUNK_BYTES) or b""


def _read_errors() -> tuple[type[Exception], ...]:
    """What reading and decompressing may raise."""
    try:
        import zstandard
    except ImportError:
        return OSError, zlib.error
    return OSError, zlib.error, zstandard.ZstdError
