"""A key-value store for one attempt of a run that the launcher may restart.

torchrun keeps one store for all attempts, and `env://` returns it without a prefix, so an attempt would find the
addresses of the previous attempt's processes. The restart count does not identify an attempt: launchers on several
nodes count separately, and a node that joins is not counted as a restart. So the processes of an attempt agree on a
fresh prefix through the store itself.

One entry has no prefix. When a collective of NCCL fails or times out, torch asks all processes through the bare store
to write down their last collectives, and whoever finds such a request ends a few minutes later. Left behind by an
attempt, it would end every attempt after it, so it is deleted.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from megatron_ltd.train.process.environment import store_port
from megatron_ltd.train.process.network import connecting, notice_silence

POLL_SECONDS = 0.02
_REQUEST_TO_DUMP = "exception_dump"
"""kStoreDumpKey of torch's ProcessGroupNCCL.hpp."""


def attempt_store(init_method: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store at `init_method` under a prefix that the processes of this attempt share and no other attempt has.

    Raises:
        DistError: a process did not arrive in time.
    """
    seconds = timeout.total_seconds()
    with connecting(store_port(init_method), seconds):
        store, _, _ = next(dist.rendezvous(init_method, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    port = getattr(store, "port", None)
    if port is not None:  # over TCP
        notice_silence(port, seconds)
    prefix = _invite(store, world_size, timeout) if rank == 0 else _join(store, rank)
    if rank == 0:  # all have come, so those of the attempt before are gone; and none gets further without this one
        store.delete_key(_REQUEST_TO_DUMP)
    return dist.PrefixStore(prefix, store)


def _invite(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    """Answer the calls of all other ranks with a new prefix, and return it once all of them have joined.

    A call may be left over from an earlier attempt. Its answer is never read, and the rank's new call replaces it.
    """
    prefix = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"joined/{prefix}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"call/{rank}"]):
                store.set(f"answer/{store.get(f'call/{rank}').decode()}", prefix)
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"{len(missing)} of {world_size} processes did not arrive within "
                                      f"{timeout.total_seconds():.0f} s, rank {min(missing)} among them")
        time.sleep(POLL_SECONDS)
    return prefix


def _join(store: dist.Store, rank: int) -> str:
    """Call rank 0 and return the prefix in its answer."""
    call = uuid.uuid4().hex
    store.set(f"call/{rank}", call)
    prefix: str = store.get(f"answer/{call}").decode()
    store.set(f"joined/{prefix}/{rank}", "")
    return prefix
