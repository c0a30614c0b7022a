"""A small model, its batches, and the steps it takes on any device."""

from typing import Any

import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.gradients import local_gradient
from megatron_ltd.parallel.mesh import Mesh
from megatron_ltd.plan.derived import policies
from megatron_ltd.train.setup import Model, build_model
from megatron_ltd.train.step import train_step

SAMPLES, LENGTH = 4, 128


def settings(model: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    """Four layers of width 128 of which the two in the middle may drop tokens."""
    shape: dict[str, Any] = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": LENGTH,
                             "vocab_size": 1000, "init_method_std": 0.05}
    return RunConfig(
        model=ModelConfig(**shape | (model or {})),
        token_drop=TokenDropConfig(random_ltd=True, random_ltd_start_length=LENGTH),
        parallel=ParallelConfig(),
        training=TrainingConfig(**{"micro_batch_size": SAMPLES, "train_iters": 1, "seed": 7} | training),
        optimizer=OptimizerConfig(lr=1e-3))


def batch(step: int = 0) -> dict[str, torch.Tensor]:
    """On the CPU, as the loader gives it; a tenth of the tokens is masked out of the loss."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(1000, (SAMPLES, LENGTH + 1), generator=generator)
    mask = (torch.rand(SAMPLES, LENGTH, generator=generator) > 0.1).float()
    return {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(), "loss_mask": mask,
            "sample_ids": torch.arange(step * SAMPLES, (step + 1) * SAMPLES)}


def losses(config: RunConfig, mesh: Mesh, device: torch.device, kept: list[int]) -> list[float]:
    """The loss of one training step for each kept length."""
    model = build_model(config, mesh, device)
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    plans = [policies(config).keeping(kept_tokens) for kept_tokens in kept]
    return [train_step(model, optimizer, [batch(step)], config, plan, learning_rate=1e-3, loss_scale=1.0,
                       stop_level=0, device=device).loss for step, plan in enumerate(plans)]


def loss_and_gradients(model: Model, config: RunConfig, device: torch.device,
                       kept_tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss of the first batch and its gradients, on the CPU in fp32."""
    of_batch: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch().items()}
    of_batch["plan"] = policies(config).keeping(kept_tokens)
    model.train_mode(of_batch["plan"])
    loss = model.pipeline.train_step(of_batch.pop("tokens"), of_batch, microbatches=1,
                                     loss_weights=torch.ones(1, device=device))
    return float(loss), {p.global_name: local_gradient(p.parameter).float().cpu() for p in model.parameters}
