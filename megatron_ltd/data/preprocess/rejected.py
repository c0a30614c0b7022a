"""What becomes of input lines that hold no document (--on-bad-line)."""

import os
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO, Literal

from megatron_ltd.data.preprocess.documents import BadLine
from megatron_ltd.errors import DataError
from megatron_ltd.log import Console

Policy = Literal["skip", "quarantine"]
_TOLD = 10


class RejectedLines:
    """Counts bad lines and tells of the first ones; with `quarantine` keeps all of them.

    Use as a context manager. On success `{prefix}_rejected.jsonl` holds the lines as they were, to be corrected and
    read again, and `{prefix}_rejected.txt` says of each where it stood and what is wrong; without a bad line, and on
    failure, neither is there.

    Args:
        resume: what `mark` of an earlier run gave.

    Attributes:
        keep: leave the partial files after a failure, for a later run to go on.
    """

    def __init__(self, policy: Policy, prefix: str, resume: tuple[int, int, int] = (0, 0, 0)):
        self.count = resume[0]
        self.keep = False
        self._quarantine = policy == "quarantine"
        self.paths = (f"{prefix}_rejected.jsonl", f"{prefix}_rejected.txt")
        self._streams: list[BinaryIO] = []
        self._stack = ExitStack()
        self._console = Console()
        self._sizes = resume[1:]

    def add(self, bad: BadLine) -> None:
        self.count += 1
        if self.count <= _TOLD:
            self._console.warn(f"left out {bad}")
        elif self.count == _TOLD + 1:
            self._console.warn("more lines are left out; only their number is told from here on")
        if not self._quarantine:
            return
        if not self._streams:
            self._open("wb", (0, 0))
        try:
            self._streams[0].write(bad.data + b"\n")
            self._streams[1].write(f"{bad}\n".encode(errors="backslashreplace"))
        except OSError as error:
            raise DataError(f"{self.paths[0]} cannot be written: {error}.") from error

    def mark(self) -> tuple[int, int, int]:
        """Brings the lines to disk: how many, and the sizes of the two files."""
        try:
            for stream in self._streams:
                stream.flush()
                os.fsync(stream.fileno())
            sizes = [stream.tell() for stream in self._streams] or [0, 0]
        except OSError as error:
            raise DataError(f"{self.paths[0]} cannot be written: {error}.") from error
        return self.count, sizes[0], sizes[1]

    def publish(self) -> None:
        """Gives finished files their names, and removes those of an earlier run; may be called again."""
        if not self._quarantine:
            return
        try:
            for path in self.paths:
                if self.count and os.path.exists(f"{path}.partial"):
                    os.replace(f"{path}.partial", path)
                elif not self.count and os.path.exists(path):
                    os.unlink(path)
        except OSError as problem:
            raise DataError(f"{self.paths[0]} cannot be written: {problem}.") from problem

    def _open(self, mode: Literal["wb", "r+b"], sizes: tuple[int, ...]) -> None:
        try:
            for path, size in zip(self.paths, sizes, strict=True):
                if mode == "r+b" and (not os.path.exists(f"{path}.partial")
                                      or os.path.getsize(f"{path}.partial") < size):
                    raise DataError(f"{path}.partial is missing or damaged. Run again without --resume.")
                stream = self._stack.enter_context(open(f"{path}.partial", mode))
                stream.seek(size)
                stream.truncate()
                self._streams.append(stream)
        except OSError as error:
            raise DataError(f"{self.paths[0]} cannot be written: {error}.") from error

    def __enter__(self) -> "RejectedLines":
        if self.count and self._quarantine:
            self._open("r+b", self._sizes)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._stack.close()
            for path in self.paths if kind is not None and not self.keep and self._streams else ():
                os.unlink(f"{path}.partial")
        except OSError as problem:
            if kind is None:
                raise DataError(f"{self.paths[0]} cannot be written: {problem}.") from problem
        if kind is None:
            self.publish()
