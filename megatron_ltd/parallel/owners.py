"""Gathers each sharded tensor on one process, for work that needs whole tensors but not every tensor on every
process."""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megatron_ltd.parallel.collectives import exchange

Place = tuple[int, ...]
"""Coordinates on a device mesh."""


class Owners:
    """Assigns each parameter to one process of its pipeline stage, its owner.

    The work is balanced over all processes of the stage, replicas included: the largest parameter first, each to the
    process with the least work so far.

    Args:
        parameters: at least one, on one mesh, in the same order on all its processes.
        work: cost of each parameter, in any unit.
    """

    def __init__(self, parameters: Sequence[DTensor], work: Sequence[float]):
        self._parameters = parameters
        mesh = parameters[0].device_mesh
        places = itertools.product(*(range(size) for size in mesh.shape))
        self._ranks = dict(zip(places, mesh.mesh.flatten().tolist(), strict=True))
        self._owners: list[Place] = [()] * len(parameters)
        loads = dict.fromkeys(self._ranks, 0.0)
        for number in sorted(range(len(parameters)), key=lambda number: -work[number]):
            self._owners[number] = min(loads, key=loads.__getitem__)
            loads[self._owners[number]] += work[number]

    def gather(self, shards: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Assemble whole tensors on their owners. Every process of the run must call it.

        Args:
            shards: one for each parameter, sharded like it; all of one dtype.

        Returns:
            whole tensors of the parameters that this process owns, by their index in `parameters`.
        """
        here = dist.get_rank()
        whole = {number: shards[number].new_empty(parameter.shape) for number, parameter in enumerate(self._parameters)
                 if self._owner(number) == here}
        place = next(place for place, rank in self._ranks.items() if rank == here)
        outgoing = [(self._owner(number), shard) for number, shard in enumerate(shards)
                    if self._is_source(number, place)]
        incoming = [(rank, self._part(number, tensor, place))
                    for number, tensor in whole.items() for place, rank in self._sources(number).items()]
        exchange(outgoing, incoming, shards[0])
        return whole

    def scatter(self, whole: Mapping[int, torch.Tensor], shards: Sequence[torch.Tensor]) -> None:
        """The inverse of `gather`: fill the shards, those of replicas too. Every process of the run must call it."""
        outgoing = [(rank, self._part(number, tensor, place))
                    for number, tensor in whole.items() for place, rank in self._ranks.items()]
        exchange(outgoing, [(self._owner(number), shard) for number, shard in enumerate(shards)], shards[0])

    def _owner(self, number: int) -> int:
        return self._ranks[self._owners[number]]

    def _sources(self, number: int) -> dict[Place, int]:
        """The processes whose shards make up the whole tensor."""
        return {place: rank for place, rank in self._ranks.items() if self._is_source(number, place)}

    def _is_source(self, number: int, place: Place) -> bool:
        """Whether the shard at a place is part of what the owner gathers; among replicas, those of its own are."""
        owner = self._owners[number]
        return all(place[axis] == owner[axis] for axis, placement in enumerate(self._parameters[number].placements)
                   if placement.is_replicate())

    def _part(self, number: int, whole: torch.Tensor, place: Place) -> torch.Tensor:
        """The shard at `place`, as a view. The last axis of the mesh, tensor parallelism, is split first; FSDP2 shards
        the result."""
        parameter = self._parameters[number]
        for axis, placement in reversed(list(enumerate(parameter.placements))):
            if not placement.is_replicate():
                dim: int = placement.dim  # type: ignore[attr-defined]
                rows = whole.shape[dim]
                share = -(-rows // parameter.device_mesh.size(axis))  # as `torch.chunk` has it
                first = min(place[axis] * share, rows)
                whole = whole.narrow(dim, first, min(share, rows - first))
        return whole
