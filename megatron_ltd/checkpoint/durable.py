"""Every file-system operation a checkpoint depends on, made durable: written, flushed to the device, then named.

A name appears only after its contents are on the device, so a crash or a power failure at any point leaves what
was there before or what was meant to be there, never a mixture. Reading never follows links and never blocks.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from megatron_ltd.errors import CheckpointError

T = TypeVar("T")


def reason(error: BaseException) -> str:
    """One line that says what went wrong, for a message to the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    if isinstance(error, CheckpointError):
        return "\n".join(lines)
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, durably; one that exists is fine."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        os.mkdir(folder)
    except FileExistsError as error:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    fsync_folder(folder.parent)


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a file."""

    size_bytes: int
    sha256: str


class NewFile:
    """A file that is hashed while it is written; one of that name is overwritten."""

    def __init__(self, path: Path):
        self.path = path
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, data: bytes | memoryview) -> None:
        if not len(data):
            return  # memoryview casts nothing that is empty
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._size_bytes += len(view)
        while view:
            view = view[self._run(os.write, view):]

    def finish(self) -> FileFacts:
        """Flush to the device; the file's own name becomes durable with its folder's."""
        self._run(os.fsync)
        return FileFacts(self._size_bytes, self._digest.hexdigest())

    def _run(self, operation: Callable[..., T], *args: object) -> T:
        """Run an operation on the descriptor; its errors name the file."""
        try:
            return operation(self._descriptor, *args)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a small file under its final name in one durable step, replacing what is there."""
    partial = path.with_name(f".tmp-{path.name}")
    with NewFile(partial) as file:
        file.write(data)
        file.finish()
    os.replace(partial, path)
    fsync_folder(path.parent)


def rename_folder(source: Path, target: Path) -> None:
    """Rename within one parent folder, durably; the target must not exist."""
    os.rename(source, target)
    fsync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Take a folder out of sight by one rename, then delete it; links in it are removed, not followed."""
    trash = folder.with_name(f".trash-{folder.name.lstrip('.')}")
    if os.path.lexists(trash):
        shutil.rmtree(trash)
    rename_folder(folder, trash)
    shutil.rmtree(trash)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading that is no link, pipe or device.

    Raises:
        CheckpointError: there is no such file, it is something else, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path} is a symbolic link; expected a regular file") from error
        if error.errno == errno.ENOENT:
            raise CheckpointError(f"{path} is missing") from error
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, limit_bytes: int) -> bytes:
    """The contents of a small regular file.

    Raises:
        CheckpointError: as `open_regular`, or the file is larger than the limit.
    """
    with open_regular(path) as stream:
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise CheckpointError(f"{path} is larger than the limit of {limit_bytes} bytes for such a file")
    return data


def is_url(place: str) -> bool:
    """Whether files lie in an object store rather than a folder."""
    return "://" in place
