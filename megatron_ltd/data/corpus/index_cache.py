"""Keeps index arrays in a folder, so that a long corpus is indexed once.

A file is the SHA-256 of (key, body), then the body: arrays in `.npy` form, one after the other. It is published by
rename and read only if the checksum is right, so a damaged, foreign or outdated file is built again, and any number of
processes may build and publish the same file at once. Where the file system supports locks, one process locks the
folder and builds while the others wait for its file; the lock ends with the process.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedRandom, BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.errors import DataError

CODE_VERSION = 1
"""Part of every key; raise it when the same key should give other arrays."""

_DIGEST_BYTES = 32
_PARTIAL = ".partial"
_LEFT_OVER_SECONDS = 3600.0

Arrays = tuple[NDArray[Any], ...]


def cached_arrays(folder: str | None, key: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """What `build` returns, read from the folder if it was built before.

    Args:
        folder: --data-cache-path; None builds in memory.
        key: all that the arrays depend on, as plain values.

    Raises:
        DataError: the folder cannot be read or written.
    """
    if folder is None:
        return build()
    text = json.dumps({**key, "code_version": CODE_VERSION}, sort_keys=True).encode()
    path = os.path.join(folder, f"{hashlib.sha256(text).hexdigest()[:32]}.index")
    try:
        arrays = _read(path, text)
        if arrays is not None:
            return arrays
        os.makedirs(folder, exist_ok=True)
        with _alone(folder) as alone:
            arrays = _read(path, text) if alone else None  # another process may have built it meanwhile
            if arrays is None:
                arrays = build()
                _publish(folder, path, text, arrays)
                if alone:
                    _remove_left_over(folder)
    except OSError as error:
        raise DataError(f"--data-cache-path = {folder} cannot be used: {error}. Choose a folder that can be written, "
                        "or leave the flag out to build the index in memory.") from error
    return arrays


@contextmanager
def _alone(folder: str) -> Iterator[bool]:
    """Waits until no other process builds an index in this folder; False where the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _checksum(stream: BufferedReader | BufferedRandom, text: bytes) -> bytes:
    """SHA-256 of the key and of what is left of the stream."""
    return hashlib.file_digest(stream, lambda: hashlib.sha256(len(text).to_bytes(8, "little") + text)).digest()


def _read(path: str, text: bytes) -> Arrays | None:
    """The arrays, or None if there is no sound file."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as stream:  # the same file for both passes, even if another is published meanwhile
        if stream.read(_DIGEST_BYTES) != _checksum(stream, text):
            return None
        end = stream.tell()
        stream.seek(_DIGEST_BYTES)
        arrays = []
        while stream.tell() < end:
            arrays.append(np.load(stream, allow_pickle=False))
    return tuple(arrays)


def _publish(folder: str, path: str, text: bytes, arrays: Arrays) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=_PARTIAL, dir=folder)
    try:
        with os.fdopen(handle, "w+b") as stream:
            stream.write(bytes(_DIGEST_BYTES))
            for array in arrays:
                np.save(stream, array, allow_pickle=False)
            stream.seek(_DIGEST_BYTES)
            checksum = _checksum(stream, text)
            stream.seek(0)
            stream.write(checksum)  # no fsync: a file that a power cut has torn fails its checksum
        os.chmod(temporary, 0o644)  # mkstemp makes files that other users of a shared cache cannot read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@cache
def _remove_left_over(folder: str) -> None:
    """Removes partial files of killed processes; a recent one may belong to a machine that does not share our lock.

    Done once a process, because with thousands of corpora the folder is long.
    """
    for entry in os.scandir(folder):
        if entry.name.startswith(".") and entry.name.endswith(_PARTIAL):
            try:
                if time.time() - entry.stat().st_mtime > _LEFT_OVER_SECONDS:
                    os.unlink(entry.path)
            except FileNotFoundError:
                continue  # it was published, or another process has removed it
