"""Keeps a second run on this host out of the folder in which one saves.

Both would write one metrics file and the same checkpoints. The claim is a socket with a name in Linux's abstract space:
it ends with its process, however that ends, so that it never stands in the way of a restart. A run on another host is
not seen: a lock in a shared file system may outlive the host that held it.
"""

import errno
import hashlib
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ltd.checkpoint.agreement import all_or_none, rank_in
from megatron_ltd.errors import CheckpointError

PATIENCE_SECONDS = 10.0
"""A run that is ending may still be there when it is started again."""


@contextmanager
def alone_in(save_dir: str | None, timeout_seconds: float) -> Iterator[None]:
    """Meanwhile no other run on this host saves there; called by all ranks.

    Args:
        timeout_seconds: of a collective.

    Raises:
        CheckpointError: on all ranks; another run does.
    """
    if save_dir is None or sys.platform != "linux":
        yield
        return
    patience = min(PATIENCE_SECONDS, timeout_seconds / 2)
    claim = all_or_none(f"--save = {save_dir} is in use",
                        lambda: _claim(save_dir, patience) if rank_in(None) == 0 else None, None)
    try:
        yield
    finally:
        if claim is not None:
            claim.close()


def _claim(save_dir: str, patience: float) -> socket.socket:
    digest = hashlib.sha256(bytes(Path(save_dir).resolve())).hexdigest()
    claim, deadline = socket.socket(socket.AF_UNIX), time.monotonic() + patience
    while True:
        try:
            claim.bind(f"\0megatron_ltd saves in {digest}")
            return claim
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            if not taken or time.monotonic() > deadline:
                claim.close()
                raise CheckpointError("another run on this host saves there; wait for its end, or give this one "
                                      "another --save" if taken else str(error)) from error
        time.sleep(0.1)
