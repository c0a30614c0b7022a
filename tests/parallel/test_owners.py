"""Whole tensors on their owners, from shards that FSDP2 and tensor parallelism made of known numbers."""

from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.parallel import data_parallel
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.parallel.owners import Owners
from tests.gloo import run_ranks
from tests.parallel.sharded import fill, noise

SHAPES = [(10, 6), (3, 8), (4, 4)]
"""Rows that divide unevenly over data-parallel processes, fewer rows than processes, and an even case."""

LAYOUTS = {"one process": (1, 1, False), "tp2": (1, 2, False), "dp2": (2, 1, False), "dp2 x tp2": (2, 2, False),
           "dp2 sharded": (2, 1, True), "dp2 sharded x tp2": (2, 2, True), "dp4 sharded": (4, 1, True)}


def sharded_module(dp: int, tp_size: int, shard_parameters: bool) -> nn.Module:
    mesh = build_mesh("cpu", pp=1, dp=dp, tp=tp_size, shard_parameters=shard_parameters, timeout=timedelta(seconds=60))
    tp = TensorParallel(mesh.tp)
    module = nn.Sequential(ColumnParallelLinear(6, 10, tp, bias=False), RowParallelLinear(8, 3, tp, bias=False),
                           ColumnParallelLinear(4, 4, tp, bias=False))
    fill(module, torch.float32)
    data_parallel.shard(module, mesh, precision="fp32", reshard_after_forward=True)
    return module


def there_and_back(rank: int, ranks: int, layout: tuple[int, int, bool]) -> tuple[dict[int, torch.Tensor], bool]:
    """The whole tensors of this process, and whether all its shards doubled when the owners doubled the tensors."""
    parameters = [p for p in sharded_module(*layout).parameters() if isinstance(p, DTensor)]
    owners = Owners(parameters, [60.0, 24.0, 16.0])
    shards = [parameter.to_local().detach() for parameter in parameters]
    doubled = [2.0 * shard for shard in shards]
    whole = owners.gather(shards)
    found = [torch.empty_like(shard) for shard in shards]
    owners.scatter({number: 2.0 * tensor for number, tensor in whole.items()}, found)
    return whole, all(map(torch.equal, found, doubled))


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_tensor_is_whole_on_one_process_and_every_process_gets_its_shard_back(name: str) -> None:
    dp, tp, _ = LAYOUTS[name]
    results = run_ranks(there_and_back, dp * tp, LAYOUTS[name])
    owned = [number for whole, _ in results for number in whole]
    assert sorted(owned) == [0, 1, 2]
    for whole, came_back in results:
        assert came_back
        for number, tensor in whole.items():
            assert torch.equal(tensor, noise(*SHAPES[number], seed=10 + number, dtype=torch.float32))
    # Work of 60 against 24 + 16 on two processes; one tensor each on four.
    shares = sorted(sorted(whole) for whole, _ in results)
    assert shares == {1: [[0, 1, 2]], 2: [[0], [1, 2]], 4: [[], [0], [1], [2]]}[dp * tp]


def two_stages(rank: int, ranks: int) -> list[float]:
    """Each pipeline stage has parameters of its own, and one of them more than the other."""
    mesh = build_mesh("cpu", pp=2, dp=1, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
    module = nn.ModuleList([ColumnParallelLinear(2, 2, TensorParallel(mesh.tp), bias=False) for _ in range(1 + rank)])
    fill(module, torch.float32, seed=100 * rank)
    parameters = [p for p in module.parameters() if isinstance(p, DTensor)]
    whole = Owners(parameters, [1.0] * len(parameters)).gather([p.to_local().detach() for p in parameters])
    return [float(tensor.sum()) for tensor in whole.values()]


def test_pipeline_stages_keep_to_themselves() -> None:
    sums = [float(noise(2, 2, seed=seed, dtype=torch.float32).sum()) for seed in (0, 100, 101)]
    assert run_ranks(two_stages, 2) == [[sums[0]], sums[1:]]
