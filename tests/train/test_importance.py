"""The importance table is one table, however many processes learn it."""

from datetime import timedelta
from typing import Any

import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.plan.derived import policies
from megatron_ltd.token_drop.importance_table import ImportanceTable
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.step import train_step
from tests.gloo import run_ranks

STEPS, VOCABULARY, LENGTH = 200, 40, 16


def batch(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """Two microbatches of two samples whose tokens are the less predictable the larger they are."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    microbatches = []
    for number in range(2):
        tokens = (torch.rand(2, LENGTH + 1, generator=generator) ** 3 * VOCABULARY).long()
        microbatches.append({
            "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(2, LENGTH),
            "sample_ids": torch.arange(2) + 8 * step + 4 * rank + 2 * number})
    return microbatches


def table_after(rank: int, ranks: int, steps: int, layout: dict[str, Any]) -> torch.Tensor:
    pp = layout.get("pipeline_model_parallel_size", 1)
    config = RunConfig(
        model=ModelConfig(num_layers=4, hidden_size=16, num_attention_heads=2, seq_length=LENGTH, vocab_size=VOCABULARY,
                          make_vocab_size_divisible_by=8),
        token_drop=TokenDropConfig(token_drop_policy="importance"), parallel=ParallelConfig(**layout),
        training=TrainingConfig(micro_batch_size=2), optimizer=OptimizerConfig(lr=1e-2))
    mesh = build_mesh("cpu", pp=pp, dp=ranks // pp, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
    device = torch.device("cpu")
    model = build_model(config, mesh, device)
    model.choose_by(ImportanceTable.initial(VOCABULARY, initial_importance=10.0, beta=0.9, always_keep=(1,),
                                            always_drop=(0,), device=device))
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    plan = policies(config).keeping(LENGTH // 2)
    for step in range(steps):
        train_step(model, optimizer, batch(step, mesh.dp_rank), config, plan, learning_rate=1e-2, loss_scale=1.0,
                   stop_level=0, device=device)
    assert model.importance is not None
    return model.importance.values


def test_data_parallel_and_pipeline_ranks_hold_the_same_table_bit_for_bit_after_200_steps() -> None:
    tables = run_ranks(table_after, 4, STEPS, {"pipeline_model_parallel_size": 2})
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert tables[0][:2].tolist() == [-1e4, 1e4]
    learned = tables[0][2:]
    assert bool((learned < 10.0).all()) and len(set(learned.tolist())) == VOCABULARY - 2
    rare, frequent = learned[-10:].mean(), learned[:10].mean()
    assert float(rare) > float(frequent), "tokens that are hard to predict matter more"
