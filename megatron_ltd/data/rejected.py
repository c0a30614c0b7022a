"""What becomes of input lines that hold no document (--on-bad-line)."""

import os
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO, Literal

from megatron_ltd.data.documents import BadLine
from megatron_ltd.errors import DataError
from megatron_ltd.log import Console

Policy = Literal["skip", "quarantine"]
_TOLD = 10


class RejectedLines:
    """Counts bad lines and tells of the first ones; with `quarantine` keeps all of them.

    Use as a context manager. On success `{prefix}_rejected.jsonl` holds the lines as they were, to be corrected and
    read again, and `{prefix}_rejected.txt` says of each where it stood and what is wrong; without a bad line, and on
    failure, neither is there.
    """

    def __init__(self, policy: Policy, prefix: str):
        self.count = 0
        self._keep = policy == "quarantine"
        self.paths = (f"{prefix}_rejected.jsonl", f"{prefix}_rejected.txt")
        self._streams: list[BinaryIO] = []
        self._stack = ExitStack()
        self._console = Console()

    def add(self, bad: BadLine) -> None:
        self.count += 1
        if self.count <= _TOLD:
            self._console.warn(f"left out {bad}")
        elif self.count == _TOLD + 1:
            self._console.warn("more lines are left out; only their number is told from here on")
        if self._keep:
            self._write(bad)

    def _write(self, bad: BadLine) -> None:
        try:
            if not self._streams:
                self._streams = [self._stack.enter_context(open(f"{path}.partial", "wb")) for path in self.paths]
            self._streams[0].write(bad.data + b"\n")
            self._streams[1].write(f"{bad}\n".encode(errors="backslashreplace"))
        except OSError as error:
            raise DataError(f"{self.paths[0]} cannot be written: {error}.") from error

    def __enter__(self) -> "RejectedLines":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        written = bool(self._streams)
        try:
            self._stack.close()
            for path in self.paths:
                if written and kind is None:
                    os.replace(f"{path}.partial", path)
                elif written:
                    os.unlink(f"{path}.partial")
                if self._keep and kind is None and not written and os.path.exists(path):
                    os.unlink(path)  # of an earlier run
        except OSError as problem:
            raise DataError(f"{self.paths[0]} cannot be written: {problem}.") from problem
