"""One training step: forward and backward over the microbatches, the sums over ranks, clipping, the update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ltd.config import RunConfig
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.clip import gradient_norm, scale_gradients
from megatron_ltd.train.setup import Model


@dataclass(frozen=True)
class StepResult:
    """What a step found, the same on every process."""

    loss: float
    """Mean cross-entropy over the global batch's tokens, before the update."""
    gradient_norm: float
    """Before clipping."""
    updated: bool
    """False where gradients overflowed and the update was left out."""
    stop_level: int
    """The most urgent request to stop of any process, as given."""


def train_step(model: Model, optimizer: ShardedOptimizer, batch: Sequence[dict[str, torch.Tensor]], config: RunConfig,
               *, learning_rate: float, kept_tokens: int, loss_scale: float, stop_level: int,
               device: torch.device) -> StepResult:
    """One optimizer step on the microbatches of this data-parallel rank.

    The loss is the mean over the tokens of the global batch that the loss mask keeps, whichever microbatch they are in.

    Args:
        batch: microbatches, as the loader gives them.
        loss_scale: of fp16; 1 otherwise.
        stop_level: how urgently this process was asked to stop, 0 for not at all; every process learns the maximum.
    """
    merged = {name: torch.cat([part[name] for part in batch]).to(device, non_blocking=True) for name in batch[0]}
    tokens = merged.pop("tokens")
    optimizer.zero_grad()
    model.train_mode(kept_tokens)
    # A first guess of 1 / tokens keeps gradients in range; what the mask takes away is made good below.
    guess = 1.0 / (tokens.numel() * model.mesh.dp_size)
    loss_sum = model.pipeline.train_step(tokens, merged, microbatches=len(batch), loss_factor=guess * loss_scale)
    model.finish_gradients()
    total_loss, total_mask = _sum_over_processes(model, loss_sum, merged["loss_mask"], device)
    stop = torch.tensor(stop_level, device=device)
    dist.all_reduce(stop, op=dist.ReduceOp.MAX)
    unscale = 1.0 / (guess * loss_scale * max(total_mask, 1.0))
    norm = float(gradient_norm(p.parameter for p in model.parameters if not p.is_copy)) * unscale
    loss = total_loss / max(total_mask, 1.0)
    updated = math.isfinite(norm) and math.isfinite(loss)
    if updated:
        clip = config.optimizer.clip_grad
        coefficient = min(1.0, clip / (norm + 1e-6)) if clip > 0.0 else 1.0
        scale_gradients((p.parameter for p in model.parameters), unscale * coefficient)
        optimizer.step(learning_rate)
    return StepResult(loss, norm, updated, int(stop))


def _sum_over_processes(model: Model, loss_sum: torch.Tensor, loss_mask: torch.Tensor,
                        device: torch.device) -> tuple[float, float]:
    """Loss and number of tokens of the global batch.

    Every tensor-parallel rank of the last stage knows the loss, and every process the tokens of its data-parallel
    rank; each is counted once.
    """
    speaks_for_loss = model.pipeline.has_last and model.mesh.tp_rank == 0
    speaks_for_tokens = model.mesh.pp_rank == 0 and model.mesh.tp_rank == 0
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.stack((loss_sum.double() if speaks_for_loss else nothing,
                        loss_mask.double().sum() if speaks_for_tokens else nothing))
    dist.all_reduce(sums)
    total_loss, total_mask = sums.tolist()
    return total_loss, total_mask
