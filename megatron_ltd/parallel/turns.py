"""Tensors that every data-parallel process needs and any could make: each makes its share, and sends it to the others.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist

Maker = Callable[[], torch.Tensor]
_AHEAD = 2
"""Tensors that a process makes before their turn, so that it need not wait for the others."""


class Turns:
    """Makes a list of tensors, each on one process of a group.

    A process makes its own in the background, in memory of the host, while those of the others arrive.

    Args:
        group: all its processes ask for all tensors, in the order of the list.
        makers: of the tensors.
        work: cost of each tensor, in any unit.
    """

    def __init__(self, group: dist.ProcessGroup, makers: Sequence[Maker], work: Sequence[float]):
        self._group, self._here = group, dist.get_rank(group)
        self._sources = deque(balanced(work, dist.get_world_size(group)))
        self._own = deque(maker for maker, source in zip(makers, self._sources, strict=True) if source == self._here)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="turns")
        self._made: deque[Future[torch.Tensor]] = deque()

    def fill(self, part: torch.Tensor, part_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Fill this process's part of the next tensor.

        Args:
            part: has the same shape on all processes of the group.
            part_of: picks it from the whole tensor.
        """
        while self._own and len(self._made) < _AHEAD:
            self._made.append(self._thread.submit(self._own.popleft()))
        source = self._sources.popleft()
        if source == self._here:
            part.copy_(part_of(self._made.popleft().result()))
        dist.broadcast(part, group=self._group, group_src=source)
        if not self._sources:
            self._thread.shutdown()


def balanced(work: Sequence[float], shares: int) -> list[int]:
    """For each item, in order, the share that has the least work so far."""
    loads = [(0.0, share) for share in range(shares)]
    found = []
    for cost in work:
        load, share = loads[0]
        heapq.heapreplace(loads, (load + cost, share))
        found.append(share)
    return found
