"""Keeps index arrays in a folder, so that a long corpus is indexed once.

A file is the SHA-256 of (key, body), then the body: arrays in `.npy` form, one after the other. It is published by
rename, and used only if the checksum is right, or was right and the file has not changed since (`seals.py`). So a
damaged, foreign or outdated file is built again, and any number of processes may build and publish the same file at
once. Where the file system supports locks, one process holds the folder's lock and builds while the others wait for its
file; the lock ends with the process.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.corpus.open_files import whole_file
from megatron_ltd.data.corpus.seals import PARTIAL, SETTLED_SECONDS, read_seal, state_of, write_seal
from megatron_ltd.errors import DataError

CODE_VERSION = 1
"""Part of every key; raise it when the same key should give other arrays."""

LOCK_NAME = ".lock"
_DIGEST_BYTES = 32
_HEADER_BYTES = 4096  # more than the header of an array of numbers takes
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
    """Waits until no other process builds an index in this folder; False where that is not to be had: the file system
    has no locks, or the lock is another user's."""
    try:
        # A file that is open for writing: a network file system locks nothing else for all hosts.
        handle = os.open(os.path.join(folder, LOCK_NAME), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _checksum(body: memoryview, text: bytes) -> bytes:
    """SHA-256 of the key and of the arrays."""
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    digest.update(body)
    return digest.digest()


def _read(path: str, text: bytes) -> Arrays | None:
    """The arrays, or None if there is no sound file. A large file is mapped, and one that was found sound before is not
    read again until it changes."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as stream:
        states = [state_of(os.fstat(stream.fileno()))]
        data = memoryview(whole_file(stream.fileno()))
    folder, name = os.path.split(path)
    facts = {"key": hashlib.sha256(text).hexdigest()}
    if read_seal(folder, name, states) != facts:
        if data[:_DIGEST_BYTES] != _checksum(data[_DIGEST_BYTES:], text):
            return None
        write_seal(folder, name, states, facts)
    return _arrays(data)


def _arrays(data: memoryview) -> Arrays:
    """The arrays of a sound file, in its memory."""
    arrays, start = [], _DIGEST_BYTES
    while start < len(data):
        head = io.BytesIO(data[start:start + _HEADER_BYTES])
        np.lib.format.read_magic(head)
        shape, _, dtype = np.lib.format.read_array_header_1_0(head)
        start += head.tell()
        array = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        arrays.append(array)
        start += array.nbytes
    return tuple(arrays)


def _publish(folder: str, path: str, text: bytes, arrays: Arrays) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=PARTIAL, dir=folder)
    try:
        with os.fdopen(handle, "w+b") as stream:
            stream.write(bytes(_DIGEST_BYTES))
            for array in arrays:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            stream.flush()
            checksum = _checksum(memoryview(whole_file(stream.fileno()))[_DIGEST_BYTES:], text)
            stream.seek(0)
            stream.write(checksum)
            stream.flush()
            os.fsync(stream.fileno())  # a seal would vouch for a file that a power cut has torn
            written = time.time() - SETTLED_SECONDS  # any write from now on has a later time: it can be sealed at once
            os.utime(stream.fileno(), (written, written))
            os.chmod(temporary, 0o644)  # mkstemp makes files that other users of a shared cache cannot read
            os.replace(temporary, path)
            states = [state_of(os.fstat(stream.fileno()))]
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    write_seal(folder, os.path.basename(path), states, {"key": hashlib.sha256(text).hexdigest()})


@cache
def _remove_left_over(folder: str) -> None:
    """Removes partial files of killed processes; a recent one may belong to a machine that does not share our lock.

    Done once a process, because with thousands of corpora the folder is long.
    """
    for entry in os.scandir(folder):
        if entry.name.startswith(".") and entry.name.endswith(PARTIAL):
            try:
                if time.time() - entry.stat().st_mtime > _LEFT_OVER_SECONDS:
                    os.unlink(entry.path)
            except FileNotFoundError:
                continue  # it was published, or another process has removed it
