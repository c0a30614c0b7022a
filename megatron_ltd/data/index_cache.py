"""Keeps index arrays in a folder, so that a long corpus is indexed once.

A file is the SHA-256 of (key, body), then the body: arrays in `.npy` form, one after the other. It is published by
rename and read only if the checksum holds, so a truncated, flipped, foreign or outdated file means building again,
and any number of processes may build and publish the same file at once.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.errors import DataError

CODE_VERSION = 1
"""Part of every key; raise it when the same key should give other arrays."""

Arrays = tuple[NDArray[Any], ...]


def cached_arrays(folder: str | None, key: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """What `build` returns, from the folder where it is there.

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
        if arrays is None:
            arrays = build()
            _publish(folder, path, text, arrays)
    except OSError as error:
        raise DataError(f"--data-cache-path = {folder} cannot be used: {error}. Choose a folder that can be written, "
                        "or leave the flag out to build the index in memory.") from error
    return arrays


def _checksum(text: bytes, body: memoryview) -> bytes:
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    digest.update(body)
    return digest.digest()


def _read(path: str, text: bytes) -> Arrays | None:
    """The arrays, or None if there is no sound file."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as stream:
        data = memoryview(stream.read())
    if bytes(data[:32]) != _checksum(text, data[32:]):
        return None
    body = io.BytesIO(data[32:])
    arrays = []
    while body.tell() < len(data) - 32:
        arrays.append(np.load(body, allow_pickle=False))
    return tuple(arrays)


def _publish(folder: str, path: str, text: bytes, arrays: Arrays) -> None:
    os.makedirs(folder, exist_ok=True)
    body = io.BytesIO()
    for array in arrays:
        np.save(body, array, allow_pickle=False)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".partial", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(_checksum(text, body.getbuffer()))
            stream.write(body.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that other users of a shared cache cannot read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
