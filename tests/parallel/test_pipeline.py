"""Every pipeline schedule on toy stages: losses, gradients and evaluation equal those of the serial chain."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_ltd.parallel.partition import stages_of_rank
from megatron_ltd.parallel.pipeline import Pipeline
from megatron_ltd.train.live_bytes import LiveBytes
from tests.gloo import run_ranks
from tests.parallel.sharded import noise

SAMPLES, LENGTH, WIDTH, MICROBATCHES, ROWS = 2, 4, 6, 6, 11
MOST = 2 * MICROBATCHES
STREAM_BYTES = 4 * LENGTH * SAMPLES * WIDTH
WEIGHTS = (0.125, 0.03)
"""Of the two loss terms."""


class Toy(nn.Module):
    """One stage: a table first, a layer everywhere, a weighted sum last; every stage reads the facts."""

    def __init__(self, stage: int, stages: int):
        super().__init__()
        self.first, self.last = stage == 0, stage == stages - 1
        self.weight = nn.Parameter(noise(WIDTH, WIDTH, seed=stage, dtype=torch.float32))
        self.table = nn.Parameter(noise(ROWS, WIDTH, seed=50, dtype=torch.float32)) if self.first else None

    def forward(self, x: torch.Tensor, *, facts: torch.Tensor) -> torch.Tensor:
        if self.table is not None:
            x = self.table[x].transpose(0, 1)
        x = torch.tanh(x @ self.weight) + facts.t()[..., None]
        if not self.last:
            return x
        return torch.stack(((x.sum(-1) * facts.t()).sum(), x.square().sum())) if self.training else x.transpose(0, 1)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, ROWS, (MOST * SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    return tokens, noise(MOST * SAMPLES, LENGTH, seed=60, dtype=torch.float32)


def on_ranks(rank: int, ranks: int, schedule: str, chunks: int, full_backward: bool,
             steps: list[int]) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    mine = stages_of_rank(schedule, rank, ranks, chunks)
    modules = [Toy(stage, ranks * chunks) for stage in mine]
    pipeline = Pipeline(modules, schedule=schedule, group=group, device=torch.device("cpu"),
                        hidden_shape=(LENGTH, SAMPLES, WIDTH), token_shape=(SAMPLES, LENGTH), dtype=torch.float32,
                        full_backward=full_backward, loss_terms=len(WEIGHTS))
    tokens, facts = data()
    losses, peaks = [], []
    for microbatches in steps:
        for module in modules:
            module.zero_grad()
        rows = microbatches * SAMPLES
        with LiveBytes(smallest=STREAM_BYTES) as live:
            losses.append(pipeline.train_step(tokens[:rows], {"facts": facts[:rows]}, microbatches=microbatches,
                                              loss_weights=torch.tensor(WEIGHTS)).tolist())
        peaks.append(live.peak)
    gradients = {f"{stage}.{name}": parameter.grad for stage, module in zip(mine, modules, strict=True)
                 for name, parameter in module.named_parameters()}
    for module in modules:
        module.eval()
    scores = pipeline.forward(tokens[:3], {"facts": facts[:3]})
    return {"losses": losses, "peaks": peaks, "gradients": gradients, "scores": scores, "has_last": pipeline.has_last,
            "last": pipeline.last_stage_rank()}


def serial(stages: int, rows: int) -> tuple[list[float], dict[str, torch.Tensor | None]]:
    """Loss terms and gradients of a chain of all stages, microbatch by microbatch."""
    chain = [Toy(stage, stages) for stage in range(stages)]
    tokens, facts = data()
    total = torch.zeros(len(WEIGHTS))
    for first in range(0, rows, SAMPLES):
        x = tokens[first:first + SAMPLES]
        for module in chain:
            x = module(x, facts=facts[first:first + SAMPLES])
        total = total + x
    (torch.tensor(WEIGHTS) * total).sum().backward()
    return total.detach().tolist(), {f"{stage}.{name}": parameter.grad for stage, module in enumerate(chain)
                          for name, parameter in module.named_parameters()}


SCHEDULES = pytest.mark.parametrize(("schedule", "ranks", "chunks", "full_backward"), [
    ("1f1b", 1, 1, False), ("1f1b", 2, 1, False), ("1f1b", 4, 1, False), ("interleaved", 2, 2, False),
    ("interleaved-zero-bubble", 2, 2, False), ("interleaved-zero-bubble", 2, 2, True), ("zbv", 2, 2, False),
    ("zbv", 2, 2, True),
])


def check(schedule: str, ranks: int, chunks: int, full_backward: bool, steps: list[int]) -> None:
    """Steps of so many microbatches each; the gradients of the last one, then a forward pass of 3 samples."""
    results = run_ranks(on_ranks, ranks, schedule, chunks, full_backward, steps)
    stages = ranks * chunks
    losses = [serial(stages, microbatches * SAMPLES)[0] for microbatches in steps]
    gradients: dict[str, torch.Tensor] = {}
    for rank, found in enumerate(results):
        gradients |= found["gradients"]
        assert found["last"] == (0 if schedule == "zbv" else ranks - 1)
        assert found["has_last"] == (rank == found["last"])
        assert (found["scores"] is not None) == found["has_last"]
        wanted = losses if found["has_last"] else [[0.0] * len(WEIGHTS)] * len(steps)
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(wanted), rtol=1e-5, atol=0.0)
    _, expected = serial(stages, steps[-1] * SAMPLES)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    tokens, facts = data()
    x: torch.Tensor = tokens[:3]
    with torch.no_grad():
        for stage in range(stages):
            x = Toy(stage, stages).eval()(x, facts=facts[:3])
    torch.testing.assert_close(results[results[0]["last"]]["scores"], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("schedule", "ranks", "chunks"), [
    ("1f1b", 2, 1), ("interleaved", 2, 2), ("interleaved-zero-bubble", 2, 2), ("zbv", 2, 2)])
def test_what_stages_exchange_is_freed_with_its_microbatch(schedule: str, ranks: int, chunks: int) -> None:
    for found in run_ranks(on_ranks, ranks, schedule, chunks, False, [MICROBATCHES, MICROBATCHES, MOST]):
        _, few, many = found["peaks"]
        assert many == few


@SCHEDULES
def test_a_pipeline_is_the_serial_chain(schedule: str, ranks: int, chunks: int, full_backward: bool) -> None:
    check(schedule, ranks, chunks, full_backward, [MICROBATCHES, MICROBATCHES])


@pytest.mark.parametrize(("schedule", "ranks", "chunks"), [
    ("1f1b", 1, 1), ("1f1b", 2, 1), ("interleaved", 2, 2), ("interleaved-zero-bubble", 2, 2), ("zbv", 2, 2)])
def test_the_number_of_microbatches_may_change_from_step_to_step(schedule: str, ranks: int, chunks: int) -> None:
    """Up as under a batch-size ramp, and down, whichever came first."""
    check(schedule, ranks, chunks, False, [MICROBATCHES, 4, MICROBATCHES, 4])
