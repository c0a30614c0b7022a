"""The global gradient norm and its clipping, against torch's on the serial model."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from megatron_ltd.optim.clip import gradient_norm, scale_gradients
from tests.gloo import run_ranks

SHAPES = {"rows": (8, 6), "columns": (6, 8), "copied": (5,), "uneven": (5, 3), "large": (4, 4), "small": (4, 4)}
SCALES = {"large": 1e6, "small": 1e-9}


def gradient(name: str, stage: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * stage)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).float() * SCALES.get(name, 1.0)


def parameters(mesh: DeviceMesh, placements: dict[str, list[Placement]], stage: int = 0) -> list[nn.Parameter]:
    made = []
    for name, placement in placements.items():
        parameter = nn.Parameter(distribute_tensor(torch.zeros(SHAPES[name]), mesh, placement, src_data_rank=None))
        parameter.grad = distribute_tensor(gradient(name, stage), mesh, placement, src_data_rank=None)
        made.append(parameter)
    return made


def clipped_on_ranks(rank: int, ranks: int, layout: str) -> tuple[float, list[torch.Tensor]]:
    """The norm, and whole gradients clipped to a norm of 1."""
    stage = 0
    if layout == "tp":
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
        placements: dict[str, list[Placement]] = {
            "rows": [Shard(0)], "columns": [Shard(1)], "copied": [Replicate()], "uneven": [Replicate()],
            "large": [Shard(1)], "small": [Shard(0)]}
    elif layout == "pp x tp":  # two stages with parameters of their own
        grid = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("pp", "tp"))
        mesh, stage = grid["tp"], grid.get_local_rank("pp")
        placements = {"rows": [Shard(0)], "columns": [Shard(1)], "copied": [Replicate()], "large": [Shard(1)]}
    else:  # replicated over the first data axis, sharded over the second
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
        placements = {"rows": [Shard(0), Shard(1)], "columns": [Replicate(), Shard(1)],
                      "copied": [Replicate(), Replicate()], "uneven": [Shard(0), Replicate()],
                      "large": [Replicate(), Shard(0)], "small": [Shard(1), Shard(0)]}
    mine = parameters(mesh, placements, stage)
    norm = gradient_norm(mine)
    assert norm.dtype is torch.float64
    scale_gradients(mine, (1.0 / (norm + 1e-6)).clamp(max=1.0).float())
    return float(norm), [p.grad.full_tensor() for p in mine]  # type: ignore[union-attr]


@pytest.mark.parametrize(("layout", "ranks"), [("tp", 1), ("tp", 2), ("tp", 4), ("pp x tp", 4), ("dp x tp", 4)])
def test_norm_and_clipped_gradients_are_those_of_the_serial_model(layout: str, ranks: int) -> None:
    names, stages = list(SHAPES), 1
    if layout == "pp x tp":
        names, stages = ["rows", "columns", "copied", "large"], 2
    serial = []
    for stage in range(stages):
        for name in names:
            serial.append(nn.Parameter(torch.zeros(SHAPES[name])))
            serial[-1].grad = gradient(name, stage)
    expected = float(nn.utils.clip_grad_norm_(serial, 1.0))
    for rank, (norm, clipped) in enumerate(run_ranks(clipped_on_ranks, ranks, layout)):
        assert norm == pytest.approx(expected, rel=1e-6)
        first = (rank // 2) * len(names) if stages == 2 else 0
        for ours, parameter in zip(clipped, serial[first:first + len(names)], strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-6, atol=0.0)


def test_the_layout_does_not_show_in_the_norm() -> None:
    norms = {run_ranks(clipped_on_ranks, ranks, layout)[0][0] for layout, ranks in (("tp", 1), ("tp", 4),
                                                                                     ("dp x tp", 4))}
    assert max(norms) - min(norms) <= 1e-13 * max(norms)


def special_norms(rank: int, ranks: int) -> list[float]:
    """A rank without parameters, an infinity on one rank, and a sum of squares beyond fp32."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    huge = nn.Parameter(torch.zeros(4))
    huge.grad = torch.full((4,), 1e30)
    alone = float(gradient_norm([huge] if rank == 0 else []))
    (sharded,) = parameters(mesh, {"rows": [Shard(0)]})
    if rank == 1:
        sharded.grad.to_local()[0, 0] = math.inf  # type: ignore[union-attr]
    infinite = float(gradient_norm([sharded]))
    if rank == 1:
        sharded.grad.to_local()[0, 0] = math.nan  # type: ignore[union-attr]
    return [alone, infinite, float(gradient_norm([sharded]))]


def test_every_rank_learns_of_values_that_are_not_finite() -> None:
    for alone, infinite, nan in run_ranks(special_norms, 2):
        assert alone == pytest.approx(2e30, rel=1e-6)
        assert infinite == math.inf and math.isnan(nan)


def test_a_factor_of_one_leaves_the_bits_of_gradients_alone() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, math.inf, -0.0])
    scale_gradients([parameter], torch.tensor(1.0))
    assert torch.equal(parameter.grad, torch.tensor([1.0, math.inf, -0.0]))
    scale_gradients([parameter], torch.tensor(0.5))
    assert parameter.grad.tolist() == [0.5, math.inf, -0.0]
    scale_gradients([], torch.tensor(0.5))
    assert not dist.is_initialized()
