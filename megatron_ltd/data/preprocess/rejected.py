"""Input lines that hold no document, and where they are kept (--on-bad-line)."""

import os
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO

from megatron_ltd.data.corpus.partial_files import remove, sync, writing
from megatron_ltd.data.preprocess.documents import BadLine
from megatron_ltd.errors import DataError
from megatron_ltd.log import Console

_TOLD = 10


class RejectedLines:
    """Counts bad lines and warns of the first ones; with `quarantine` keeps all of them.

    Use as a context manager while lines are added. Once published, `{prefix}_rejected.jsonl` holds the lines as they
    were, to be corrected and read again, and `{prefix}_rejected.txt` gives the place of each and what is wrong with
    it; without a bad line, and after a failure, neither file exists.

    Args:
        resume: what `mark` of an earlier run gave.

    Attributes:
        keep: leave the partial files after a failure, for a later run to continue.
    """

    def __init__(self, quarantine: bool, prefix: str, resume: tuple[int, int, int] = (0, 0, 0)):
        self.count, *self._sizes = resume
        self.keep = False
        self.paths: tuple[str, ...] = (f"{prefix}_rejected.jsonl", f"{prefix}_rejected.txt") if quarantine else ()
        self._streams: list[BinaryIO] = []
        self._stack = ExitStack()
        self._console = Console()

    def add(self, bad: BadLine) -> None:
        self.count += 1
        if self.count <= _TOLD:
            self._console.warn(f"left out {bad}")
        elif self.count == _TOLD + 1:
            self._console.warn("more lines are left out; only their number is reported from here on")
        if self.paths:
            if not self._streams:
                self._open()
            with writing(self.paths[0]):
                self._streams[0].write(bad.data + b"\n")
                self._streams[1].write(f"{bad}\n".encode(errors="backslashreplace"))

    def mark(self) -> tuple[int, int, int]:
        """Brings the lines to disk: how many, and the sizes of the two files."""
        if not self._streams:
            return self.count, 0, 0
        with writing(self.paths[0]):
            for stream in self._streams:
                sync(stream)
            return self.count, self._streams[0].tell(), self._streams[1].tell()

    def publish(self) -> None:
        """Gives finished files their names, and removes those of an earlier run; may be called again."""
        for path in self.paths:
            with writing(path):
                if not self.count:
                    remove(path)
                elif os.path.exists(f"{path}.partial"):
                    os.replace(f"{path}.partial", path)

    def _open(self) -> None:
        """Opens both files, as long as they were when they were marked."""
        for path, size in zip(self.paths, self._sizes, strict=True):
            with writing(path):
                stream = self._stack.enter_context(open(f"{path}.partial", "ab"))
                if stream.tell() < size:
                    raise DataError(f"{path}.partial is missing or damaged. Run again without --resume.")
                stream.seek(size)
                stream.truncate()
                self._streams.append(stream)

    def __enter__(self) -> "RejectedLines":
        if self.count and self.paths:
            self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._stack.close()
        except OSError as problem:  # after a failure what the buffers still held is of no use
            if kind is None:
                raise DataError(f"{self.paths[0]} cannot be written: {problem}.") from problem
        if kind is not None and not self.keep:
            remove(*(f"{path}.partial" for path in self.paths))
