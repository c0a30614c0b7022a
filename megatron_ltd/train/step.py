"""One training step: forward and backward over the microbatches, sums over ranks, clipping, update."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ltd.config import RunConfig
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.clip import gradient_norm, scale_gradients
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.train.setup import Model


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every process."""

    loss: float
    """Mean cross-entropy over the global batch's predicted tokens, before the update."""
    sentence_order_loss: float | None
    """Mean cross-entropy of the sentence order over the global batch; None for models without that head."""
    gradient_norm: float
    """Before clipping."""
    updated: bool
    """False if gradients overflowed and the update was skipped."""
    stop_level: int
    """The highest `stop_level` of any process."""


def train_step(model: Model, optimizer: ShardedOptimizer, batch: Sequence[dict[str, torch.Tensor]], config: RunConfig,
               plan: StepPlan, *, learning_rate: float, loss_scale: float, stop_level: int,
               device: torch.device) -> StepResult:
    """One optimizer step on the microbatches of this data-parallel rank.

    The loss is the mean over the tokens of the global batch that the loss mask keeps, whichever microbatch they are in;
    with the sentence order, plus its mean over the samples.

    Args:
        batch: microbatches, as returned by the loader.
        plan: what the step computes; samples are truncated to its tokens of text.
        loss_scale: of fp16; 1 otherwise.
        stop_level: how urgently this process was asked to stop (0: not at all); every process receives the maximum.
    """
    parts = [in_bags(cut(part, plan.text_tokens, config.model.seq_length), plan.fold) for part in batch]
    merged = {name: torch.cat([part[name] for part in parts]).to(device, non_blocking=True) for name in parts[0]}
    tokens = merged.pop("tokens")
    predictions, samples = _global_batch(model, merged)
    if model.importance is not None and plan.kept_tokens < tokens.shape[1]:
        merged["kept"] = model.importance.kept_positions(tokens, merged.get("padding_mask"), plan.kept_tokens,
                                                         config.token_drop.random_ltd_strata)
    optimizer.zero_grad()
    model.train_mode(plan)
    means = 1.0 / torch.tensor([predictions, samples][:model.pipeline.loss_terms])
    of_step: dict[str, Any] = {"plan": plan, "loss_record": model.loss_record}
    if config.model.mixture_of_depths_capacity is not None:  # a mean over the tokens of the global batch
        of_step["router_weight"] = loss_scale / (samples * plan.read_tokens)
    sums = model.pipeline.train_step(tokens, merged | of_step, microbatches=len(batch),
                                     loss_weights=(means * loss_scale).to(device))
    model.finish_gradients(plan)
    losses = (_sum_over_processes(model, sums) * means.double()).tolist()
    stop = torch.tensor(stop_level, device=device)
    dist.all_reduce(stop, op=dist.ReduceOp.MAX)
    norm = float(gradient_norm(p.parameter for p in model.parameters if not p.is_copy)) / loss_scale
    updated = math.isfinite(norm) and all(map(math.isfinite, losses))
    if updated:
        clip = config.optimizer.clip_grad
        coefficient = min(1.0, clip / (norm + 1e-6)) if clip > 0.0 else 1.0
        scale_gradients((p.parameter for p in model.parameters), coefficient / loss_scale)
        optimizer.step(learning_rate)
    _learn_importance(model, updated)
    return StepResult(losses[0], losses[1] if len(losses) > 1 else None, norm, updated, int(stop))


def cut(microbatch: dict[str, torch.Tensor], read_tokens: int, full_tokens: int) -> dict[str, torch.Tensor]:
    """The first tokens of each GPT sample, with their labels, masks and positions.

    Shapes:
        [b, s] becomes [b, read_tokens]; [b] is unchanged
    """
    if read_tokens == full_tokens:
        return microbatch
    return {name: tensor[:, :read_tokens] if tensor.dim() == 2 else tensor for name, tensor in microbatch.items()}


def in_bags(microbatch: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """The tokens of GPT samples in bags, and for each bag the labels and masks of the next one. The last bag has one
    label; what it lacks is masked, and so uncounted.

    Shapes:
        [b, s size] becomes [b, s, size]
    """
    if size == 1:
        return microbatch
    # The label of a token is the token after it, so the next bag's tokens are the labels from this bag's last on.
    moved = {name: F.pad(microbatch[name][:, size - 1:], (0, size - 1)) for name in ("labels", "loss_mask")}
    return microbatch | {name: tensor.unflatten(1, (-1, size))
                         for name, tensor in {"tokens": microbatch["tokens"], **moved}.items()}


def _global_batch(model: Model, batch: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Numbers of unmasked tokens and of samples in the global batch, at least one each.

    They are known before the first forward pass, so that gradients are scaled correctly however the tokens are
    distributed over microbatches.
    """
    mask = batch["loss_mask"]
    counts = torch.tensor([0.0, 0.0], dtype=torch.float64, device=mask.device)
    if model.mesh.pp_rank == 0 and model.mesh.tp_rank == 0:  # each data-parallel rank is counted once
        counts[0], counts[1] = mask.double().sum(), len(mask)
    dist.all_reduce(counts)
    predictions, samples = counts.tolist()
    return max(predictions, 1.0), samples


def _sum_over_processes(model: Model, sums: torch.Tensor) -> torch.Tensor:
    """The loss terms of the global batch, on the CPU. Every tensor-parallel rank of the last stage has them; the one
    that holds the first token contributes them to the sum."""
    speaks = model.pipeline.has_last and model.mesh.tp_rank == 0
    total = sums.double() if speaks else torch.zeros_like(sums, dtype=torch.float64)
    dist.all_reduce(total)
    return total.cpu()


def _learn_importance(model: Model, updated: bool) -> None:
    """Update the importance table with the losses of the global batch: the same sums, and so the same table, on every
    process."""
    if model.importance is None or model.loss_record is None:
        return
    sums = model.loss_record.sums
    if not (model.pipeline.has_last and model.mesh.tp_rank == 0):
        sums.zero_()
    dist.all_reduce(sums)
    if updated:
        model.importance.update(sums)
    model.loss_record.clear()
