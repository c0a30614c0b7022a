"""Random access to more files than a process may have open, from several threads; and whole files, mapped or read."""

import mmap
import os
import resource
import threading
import weakref
from collections import deque

from megatron_ltd.data.corpus.seals import state_of
from megatron_ltd.errors import DataError

_LEFT_TO_OTHERS = 256  # of the files that the process may have open
_LEAST_OPEN = 64
_SMALL_BYTES = 8 << 20  # up to here a file is read rather than mapped: a map takes an open file


class _Handle:
    """A file descriptor that is closed with the last reference to it."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ReadFile:
    """A file of a fixed size. When too many are open, the one opened longest ago is closed until it is read again.

    Attributes:
        size_bytes: when it was opened.
        state: when it was opened; see `seals.py`.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str):
        self.path = path
        self._handle: _Handle | None = _Handle(path)
        self._identity = _identity(self._handle)
        self.state = state_of(os.fstat(self._handle.fd))
        self.size_bytes = self._identity[2]
        _opened(self)

    def read(self, start_bytes: int, size_bytes: int) -> bytes:
        """Bytes from an offset on; fewer only at the end of the file.

        Raises:
            DataError: they cannot be read, or another file has taken the name.
        """
        try:
            handle = self._handle or self._reopen()
            data = os.pread(handle.fd, size_bytes, start_bytes)
            while len(data) < size_bytes:
                more = os.pread(handle.fd, size_bytes - len(data), start_bytes + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise DataError(f"{self.path}, near byte {start_bytes}: {error}.") from error
        return data

    def close(self) -> None:
        """Releases the descriptor, which is closed once no thread reads from it; reading opens the file again."""
        self._handle = None

    def _reopen(self) -> _Handle:
        handle = _Handle(self.path)
        if _identity(handle) != self._identity:
            raise DataError(f"{self.path} was replaced or changed its size while it was in use. Put the file back and "
                            "run again; a new version of a corpus needs a name of its own.")
        self._handle = handle
        _opened(self)
        return handle


def whole_file(descriptor: int) -> mmap.mmap | bytes:
    """All bytes of an open file. A large one is mapped, so that processes share it and only what is used is read; not
    where the process may not have that many files open."""
    size = os.fstat(descriptor).st_size
    if size > _SMALL_BYTES and _room() > _LEAST_OPEN:
        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        _maps.add(mapped)
        return mapped
    parts, start = [], 0
    while start < size and (part := os.pread(descriptor, size - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def most_open() -> int:
    """How many files of `ReadFile` may be open at a time under the limit of the process (ulimit -n)."""
    return max(_room(), _LEAST_OPEN)


def _room() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit - _LEFT_TO_OTHERS - len(_maps) if limit != resource.RLIM_INFINITY else 1 << 30


_open: "deque[weakref.ref[ReadFile]]" = deque()
_maps: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()
_lock = threading.Lock()


def _opened(file: ReadFile) -> None:
    """Registers an open file, and closes the oldest ones while there are too many."""
    with _lock:
        _open.append(weakref.ref(file))
        most = most_open()
        while len(_open) > most:
            oldest = _open.popleft()()
            if oldest is not None and oldest is not file:
                oldest.close()


def _identity(handle: _Handle) -> tuple[int, int, int]:
    found = os.fstat(handle.fd)
    return found.st_dev, found.st_ino, found.st_size
