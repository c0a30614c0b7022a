"""A tensor-parallel axis of one process, for everything that needs no second one."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron_ltd.parallel.collectives import TensorParallel


@pytest.fixture(scope="module")
def tp() -> Iterator[TensorParallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TensorParallel(init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    dist.destroy_process_group()
