"""What sharding promises of memory, as the peak of live bytes of parameters, gradients, optimizer state and
communication buffers: of a process with P bytes of whole fp32 parameters, of which weights, gradients and two moments
are shared by dp processes,

    ZeRO-2      P + 4 P / dp + 3 groups         the whole parameters stay for all microbatches
    ZeRO-3          4 P / dp + 3 groups

A group is what is gathered and reduced at once: a layer, or all that is outside the layers.
"""

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.train.live_bytes import LiveBytes
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.step import train_step
from tests.gloo import run_ranks
from tests.plans import plan_of

DP, LAYERS, LENGTH, WIDTH = 2, 8, 4, 128
SMALLEST = 16 << 10
"""Bytes of the smallest storage that counts: larger than any activation of this model, smaller than a matrix's shard
or a buffer."""


def microbatch(number: int) -> dict[str, torch.Tensor]:
    text = torch.randint(100, (1, LENGTH + 1), generator=torch.Generator().manual_seed(number))
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(1, LENGTH),
            "sample_ids": torch.tensor([number])}


def measured(rank: int, ranks: int, config: RunConfig, microbatches: int, plan: StepPlan) -> tuple[int, int, int]:
    """Bytes of this process's parameters, of its largest group, and at the peak of building the model and two steps."""
    mesh = build_mesh("cpu", pp=config.parallel.pipeline_model_parallel_size, dp=DP, tp=1, shard_parameters=True,
                      timeout=timedelta(seconds=60))
    device = torch.device("cpu")
    with LiveBytes(SMALLEST) as live:
        model = build_model(config, mesh, device)
        optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
        for _ in range(2):
            train_step(model, optimizer, [microbatch(number) for number in range(microbatches)], config, plan,
                       learning_rate=1e-3, loss_scale=1.0, stop_level=0, device=device)
    groups: Counter[int | None] = Counter()
    for p in model.parameters:
        groups[p.layer] += 4 * p.parameter.numel()
    return groups.total(), max(groups.values()), live.peak


def without_backward(plan: StepPlan) -> StepPlan:
    return replace(plan, layers=tuple(replace(layer, backward=number % 2 == 1)
                                      for number, layer in enumerate(plan.layers)))


WHOLE = plan_of(LENGTH, LAYERS)
CASES: dict[str, tuple[dict[str, Any], int, StepPlan]] = {
    "four-microbatches": ({}, 4, WHOLE),
    "recomputed": ({"recompute_granularity": "full"}, 2, WHOLE),
    "half-the-backward-passes": ({}, 2, without_backward(WHOLE)),
    "pp2": ({"pipeline_model_parallel_size": 2}, 3, WHOLE),
    "pp2-zbv": ({"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"}, 4, WHOLE),
}


@pytest.mark.parametrize(("sharding", "case"), [
    *(("optim_grads_params", case) for case in CASES),
    *(("optim_grads", case) for case in ("four-microbatches", "pp2"))])
def test_sharding_keeps_no_more_whole_tensors_than_it_promises(sharding: str, case: str) -> None:
    layout, microbatches, plan = CASES[case]
    config = RunConfig(
        model=ModelConfig(num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=4, seq_length=LENGTH,
                          vocab_size=128),
        training=TrainingConfig(micro_batch_size=1), optimizer=OptimizerConfig(lr=1e-3),
        parallel=ParallelConfig(data_parallel_sharding_strategy=sharding, **layout))  # type: ignore[arg-type]
    ranks = DP * config.parallel.pipeline_model_parallel_size
    for whole, group, peak in run_ranks(measured, ranks, config, microbatches, plan):
        gathered = whole if sharding == "optim_grads" else 0
        assert 4 * whole / DP < peak <= gathered + 4 * whole / DP + 3 * group
