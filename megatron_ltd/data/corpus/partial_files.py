"""Files that are not complete yet: how they are written, and how those of a corpus get their names."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from megatron_ltd.data.corpus.manifest import manifest_path
from megatron_ltd.errors import DataError


@contextmanager
def writing(path: str, remedy: str = "") -> Iterator[None]:
    """Turns an error of the file system into a DataError that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}.{remedy}") from error


def sync(stream: BinaryIO | TextIO) -> None:
    """Brings all that was written to disk."""
    stream.flush()
    os.fsync(stream.fileno())


def remove(*paths: str) -> None:
    """Removes those of the files that exist."""
    for path in paths:
        Path(path).unlink(missing_ok=True)


def publish_corpus(prefix: str) -> None:
    """Gives finished partial files their names; continues an earlier call that was interrupted.

    An old index is removed first and the new one is renamed last: an index never stands beside tokens or a manifest of
    another corpus.
    """
    with writing(prefix):
        if os.path.exists(f"{prefix}.bin.partial"):
            remove(f"{prefix}.idx", manifest_path(prefix))
        for path in (f"{prefix}.bin", manifest_path(prefix), f"{prefix}.idx"):
            if os.path.exists(f"{path}.partial"):
                os.replace(f"{path}.partial", path)
        remove(*side_files(prefix))
        folder = os.open(os.path.dirname(prefix) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def side_files(prefix: str) -> tuple[str, str]:
    """What a writer that can be resumed keeps besides `.bin`: lengths and document boundaries."""
    return f"{prefix}.lengths.partial", f"{prefix}.documents.partial"


def partial_files(prefix: str) -> tuple[str, ...]:
    """All files of an unfinished corpus, `.bin` first."""
    return (f"{prefix}.bin.partial", f"{prefix}.idx.partial", f"{manifest_path(prefix)}.partial", *side_files(prefix))


def open_partial(path: str) -> BinaryIO:
    """A file that only this process writes.

    Raises:
        DataError: another process writes it.
        OSError: it cannot be opened.
    """
    stream = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise DataError(f"{path} is being written by another process. Wait for it, or choose another "
                        "prefix.") from error
    if not os.path.exists(path) or os.fstat(stream.fileno()).st_ino != os.stat(path).st_ino:
        stream.close()
        raise DataError(f"{path} was just published by another process. Choose another prefix.")
    return stream
