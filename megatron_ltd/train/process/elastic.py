"""A run whose nodes come and go: how many of its processes train, and what the others do meanwhile.

Tensor- and pipeline-parallel sizes and the global batch stay, so the curve stays; the data-parallel size follows the
number of processes. Processes beyond the largest number that fits are spares until a node comes or goes.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_ltd.log import Console
from megatron_ltd.train.process.environment import Launch

if TYPE_CHECKING:
    from torch.distributed import Store

_ENDED = "ended"
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0


def placed(here: Launch, fits: Callable[[int], bool]) -> Launch:
    """This process's place among those that train, or among the spares. Returns only if some can train.

    Args:
        fits: whether the settings are sound for a number of processes.
    """
    started = here.world_size
    training = next((number for number in range(started, 0, -1) if fits(number)), 0)
    if not training:
        _wait_for_nodes(here)
    if training < started and here.rank == 0:
        Console().line(f"{started} processes, of which {training} train: more do not fit the parallel sizes and the "
                       "global batch")
    return replace(here, world_size=training, spares=started - training)


def _wait_for_nodes(here: Launch) -> None:
    """Wait until the launcher ends this process, which it does when a node joins."""
    if here.rank == 0:
        Console().line(f"waiting for more nodes: {here.world_size} processes are too few for the parallel sizes, or do "
                       "not divide the global batch")
    while True:
        time.sleep(3600)


def wait_as_spare(here: Launch, timeout: timedelta) -> int:
    """Wait until the processes that train have ended, and return their exit code.

    Raises:
        DistError: they are gone without a word.
    """
    from megatron_ltd.train.process.attempt import attempt_store  # only here: it imports torch

    assert here.init_method is not None
    store = attempt_store(here.init_method, here.rank, here.world_size + here.spares, timeout)
    while not store.check([_ENDED]):
        time.sleep(_POLL_SECONDS)
    code = int(store.get(_ENDED))
    store.set(f"heard/{here.rank}", "")
    return code


def tell_spares(here: Launch, store: "Store", code: int) -> None:
    """Tell the spares how the run has ended. Rank 0 does, whose process may host the store and so has to wait."""
    if here.rank == 0 and here.spares:
        store.set(_ENDED, str(code))
        heard = [f"heard/{rank}" for rank in range(here.world_size, here.world_size + here.spares)]
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not store.check(heard) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 10)
