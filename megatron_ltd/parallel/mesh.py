"""The rank grid: every process has a coordinate on the axes pipeline, data and tensor.

    rank = (pp_rank * dp + dp_rank) * tp + tp_rank

Tensor-parallel ranks are neighbours, since they communicate most (https://arxiv.org/abs/2104.04473, section 3.2). The
data axis is two axes of which one has size 1: parameters are either replicated over it or sharded over it, and the same
engine does both.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Backend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Mesh:
    """This process's coordinates, and its process groups; `world` is the device mesh over `AXES`."""

    world: DeviceMesh

    @property
    def tp(self) -> DeviceMesh:
        return self.world["tp"]

    @property
    def data(self) -> DeviceMesh:
        """The data-parallel axes, in the form the sharding engine expects. For one that replicates, even over a single
        process, it would reduce every gradient a second time and keep both sums until the end of the step."""
        return self.world["dp_shard"] if self.world.size(1) == 1 else self.world["dp_replicate", "dp_shard"]

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The data-parallel processes: those with the same pipeline and tensor coordinates."""
        return self.world["dp_shard" if self.world.size(1) == 1 else "dp_replicate"].get_group()

    @property
    def pp_size(self) -> int:
        return self.world.size(0)

    @property
    def dp_size(self) -> int:
        return self.world.size(1) * self.world.size(2)

    @property
    def tp_size(self) -> int:
        return self.world.size(3)

    @property
    def pp_rank(self) -> int:
        return self.world.get_local_rank("pp")

    @property
    def dp_rank(self) -> int:
        return self.world.get_local_rank("dp_replicate") + self.world.get_local_rank("dp_shard")

    @property
    def tp_rank(self) -> int:
        return self.world.get_local_rank("tp")

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.world["pp"].get_group()


def build_mesh(device_type: str, *, pp: int, dp: int, tp: int, shard_parameters: bool, timeout: timedelta) -> Mesh:
    """The mesh over all ranks of the default process group.

    Args:
        device_type: "cuda" or "cpu".
        pp, dp, tp: sizes of the axes; their product is the world size.
        shard_parameters: whether data-parallel ranks shard the parameters rather than replicate them.
        timeout: of every collective and of every message between two ranks; a group created without one would ignore
            that of the default group.
    """
    replicate, shard = (1, dp) if shard_parameters else (dp, 1)
    shape = (pp, replicate, shard, tp)
    made_with = None
    if device_type == "cpu" and dist.get_backend() == dist.Backend.GLOO:
        # Gloo's groups are made with their timeout: messages between two ranks ignore one that is set later. An axis
        # over all ranks is the default group, which has it.
        options = dist.Backend.GLOO, Backend.Options("gloo", timeout)
        made_with = {axis: options for axis, size in zip(AXES, shape, strict=True) if 1 < size < dist.get_world_size()}
    world = init_device_mesh(device_type, shape, mesh_dim_names=AXES,
                             backend_override=made_with)  # type: ignore[arg-type]
    for axis in AXES:
        _set_pg_timeout(timeout, world[axis].get_group())
    return Mesh(world)
