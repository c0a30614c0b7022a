"""Seals: a note that a file was read in full and found sound, so that the next start need not read it again.

A seal lies in --data-cache-path and holds the state of the files it speaks for: size, inode, and times of the last
write and the last change. It is trusted while these are the same and its own checksum holds. Damage of the files that
comes without a write, from a bad disk, is found by --verify-corpus, which removes all seals.
"""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError

PARTIAL = ".partial"
"""How the names of unfinished files in the folder end."""
SETTLED_SECONDS = 2.0
"""Age of a file's last write from which any later write has another time, whatever the clock's granularity."""
_SUFFIX = ".seal"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

State = list[int]


def state_of(stat: os.stat_result) -> State:
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def read_seal(folder: str, name: str, states: Sequence[State]) -> dict[str, Any] | None:
    """What was noted of files in these states; None without a seal, or with one of other states or that is damaged."""
    try:
        found = json.loads((Path(folder) / (name + _SUFFIX)).read_bytes())
        facts: dict[str, Any] = found["facts"]
        sound = found["states"] == list(states) and found["sha256"] == _checksum(states, facts)
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # torn by a crash: the file is read in full again
        return None
    return facts if sound else None


def _checksum(states: Sequence[State], facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([list(states), facts], sort_keys=True).encode()).hexdigest()


def write_seal(folder: str, name: str, states: Sequence[State], facts: dict[str, Any]) -> None:
    """Notes facts of sound files.

    Args:
        states: before they were read. A file that was written a moment ago is not sealed.

    Raises:
        DataError: the folder cannot be written, but for one that others keep and this process may only read.
    """
    if any(time.time() - written_ns / 1e9 < SETTLED_SECONDS for *_, written_ns, _ in states):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=PARTIAL, dir=folder)
        with os.fdopen(handle, "w") as stream:
            json.dump({"states": list(states), "facts": facts, "sha256": _checksum(states, facts)}, stream)
        os.chmod(temporary, 0o644)
        os.replace(temporary, os.path.join(folder, name + _SUFFIX))
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise DataError(f"--data-cache-path = {folder} cannot be written: {error}. Choose a folder that can, or "
                            "leave the flag out.") from error


def remove_seals(folder: str) -> None:
    """Removes all seals of a folder, so that every file is read in full.

    Raises:
        DataError: one cannot be removed.
    """
    try:
        for path in Path(folder).glob(f"*{_SUFFIX}"):
            path.unlink(missing_ok=True)  # other processes of the run remove them too
    except OSError as error:
        raise DataError(f"--verify-corpus: the seals in --data-cache-path = {folder} cannot be removed: {error}. Use "
                        "another folder, or leave it out.") from error
