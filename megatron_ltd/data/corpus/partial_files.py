"""The files that stand for a corpus while it is written, and how they get their names."""

import fcntl
import os
from typing import BinaryIO

from megatron_ltd.data.corpus.manifest import manifest_path
from megatron_ltd.errors import DataError


def publish_corpus(prefix: str) -> None:
    """Gives finished partial files their names; goes on where an earlier call was ended.

    The index comes last and an old one goes first: it never stands beside tokens or a manifest that are not its own.
    """
    try:
        if os.path.exists(f"{prefix}.bin.partial"):
            for path in (f"{prefix}.idx", manifest_path(prefix)):
                if os.path.exists(path):
                    os.unlink(path)
        for path in (f"{prefix}.bin", manifest_path(prefix), f"{prefix}.idx"):
            if os.path.exists(f"{path}.partial"):
                os.replace(f"{path}.partial", path)
        for path in side_files(prefix):
            if os.path.exists(path):
                os.unlink(path)
        folder = os.open(os.path.dirname(prefix) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise DataError(f"{prefix} cannot be written: {error}.") from error


def side_files(prefix: str) -> tuple[str, str]:
    """What a writer that can be resumed keeps besides `.bin`: lengths and document boundaries."""
    return f"{prefix}.lengths.partial", f"{prefix}.documents.partial"


def partial_files(prefix: str) -> tuple[str, ...]:
    """All that stands for an unfinished corpus, `.bin` first."""
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
