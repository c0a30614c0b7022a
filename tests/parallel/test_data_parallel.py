"""Data parallelism in its three kinds: gradients are the sum over all samples, whole and in fp32."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.model.projection import project
from megatron_ltd.optim.clip import gradient_norm, scale_gradients
from megatron_ltd.parallel import data_parallel
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ltd.parallel.mesh import build_mesh
from tests.gloo import run_ranks
from tests.parallel.sharded import fill, noise, whole_gradients

WIDTH, INNER, SAMPLES = 6, 10, 4
KINDS = {"replicated": (False, False), "optimizer and gradients": (True, False), "parameters too": (True, True)}
"""Shard over the data axis, and free the parameters between forward and backward."""


class Region(nn.Module):
    def __init__(self, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.first = ColumnParallelLinear(WIDTH, INNER, tp, bias=True)
        self.last = RowParallelLinear(INNER, WIDTH, tp, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (inner,) = project(x, [self.first.linear], self.tp, None, False)
        return self.last(torch.tanh(inner))


def build(dp: int, tp_size: int, kind: str, precision: str = "fp32") -> tuple[Region, int]:
    """A sharded region and this process's data-parallel rank."""
    shard, free = KINDS[kind]
    mesh = build_mesh("cpu", pp=1, dp=dp, tp=tp_size, shard_parameters=shard, timeout=timedelta(seconds=60))
    region = Region(TensorParallel(mesh.tp))
    fill(region, torch.float32)
    data_parallel.shard(region, mesh, precision=precision, reshard_after_forward=free)
    return region, mesh.dp_rank


def samples_of(dp_rank: int) -> torch.Tensor:
    return noise(SAMPLES, 1, WIDTH, seed=70 + dp_rank, dtype=torch.float32)


def on_ranks(rank: int, ranks: int, dp: int, kind: str) -> dict[str, Any]:
    region, dp_rank = build(dp, ranks // dp, kind)
    for _ in range(2):  # two microbatches add up
        region(samples_of(dp_rank)).square().sum().backward()
    gradients = whole_gradients(region)
    norm = gradient_norm(region.parameters())
    scale_gradients(region.parameters(), 1.0 / float(norm))
    return {"gradients": gradients, "norm": norm, "clipped": whole_gradients(region),
            "dtypes": {p.grad.dtype for p in region.parameters() if p.grad is not None}}


def serial(dp: int) -> nn.Sequential:
    """The same weights in plain layers, after the backward passes of all samples."""
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.Tanh(), nn.Linear(INNER, WIDTH))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=10 + number))
    for dp_rank in range(dp):
        for _ in range(2):
            model(samples_of(dp_rank)).square().sum().backward()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (2, 2), (3, 1)])
def test_gradients_and_their_norm_are_those_of_all_samples_in_one_process(dp: int, tp: int, kind: str) -> None:
    """Three ranks do not divide the rows of any parameter."""
    expected = serial(dp)
    parameters = list(expected.parameters())
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    for found in run_ranks(on_ranks, dp * tp, dp, kind):
        assert found["dtypes"] == {torch.float32}
        assert float(found["norm"]) == pytest.approx(float(norm), rel=1e-6)
        for name, whole, clipped, parameter in zip(found["gradients"], found["gradients"].values(), gradients,
                                                   parameters, strict=True):
            torch.testing.assert_close(whole, clipped, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(found["clipped"][name], parameter.grad, rtol=1e-5, atol=1e-6)


def half_precision(rank: int, ranks: int, kind: str) -> dict[str, Any]:
    region, dp_rank = build(ranks, 1, kind, precision="bf16")
    x = samples_of(dp_rank).to(torch.bfloat16)
    y = region(x)
    y.float().square().sum().backward()
    return {"output": y.dtype, "weights": {p.dtype for p in region.parameters()},
            "gradients": {p.grad.dtype for p in region.parameters() if p.grad is not None},
            "whole": whole_gradients(region)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dp", [1, 2])
def test_in_half_precision_layers_compute_in_it_and_weights_and_gradients_stay_fp32(dp: int, kind: str) -> None:
    expected: dict[str, torch.Tensor] = {}
    for dp_rank in range(dp):  # each rank computes in bfloat16, sums are taken in fp32
        model = serial(0).to(torch.bfloat16)
        model(samples_of(dp_rank).to(torch.bfloat16)).float().square().sum().backward()
        for name, p in zip(("first.weight", "first.bias", "last.weight", "last.bias"), model.parameters(), strict=True):
            assert p.grad is not None
            expected[name] = expected.get(name, torch.zeros(())) + p.grad.float()
    for found in run_ranks(half_precision, dp, kind):
        assert found["output"] is torch.bfloat16
        assert found["weights"] == found["gradients"] == {torch.float32}
        for name, gradient in found["whole"].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-5)


def after_evaluation(rank: int, ranks: int, kind: str) -> list[bool]:
    """A weight that is changed after a forward pass without a backward pass shows in the next forward pass."""
    region, _ = build(ranks, 1, kind)
    parameters = list(region.parameters())  # as the optimizer holds them, from before any forward pass
    x = samples_of(0)
    with torch.no_grad():
        before = region(x)
        data_parallel.reshard([region])
        for parameter in parameters:
            assert isinstance(parameter, DTensor)
            parameter.to_local().zero_()
        after = region(x)
    return [bool(before.any()), bool(after.any())]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_after_an_evaluation_is_not_lost(kind: str) -> None:
    assert run_ranks(after_evaluation, 2, kind) == [[True, False]] * 2


def untouched(rank: int, ranks: int) -> list[str]:
    region, _ = build(1, 1, "replicated")
    return [type(region).__name__, *(str(p.placements) for p in region.parameters() if isinstance(p, DTensor))]


def test_one_process_in_fp32_is_left_as_it_is() -> None:
    assert run_ranks(untouched, 1) == [["Region", "(Shard(dim=0),)", "(Shard(dim=0),)", "(Shard(dim=1),)",
                                        "(Replicate(),)"]]
