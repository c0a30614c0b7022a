"""One training step: forward and backward over the microbatches, sums over ranks, clipping, update.

The host launches a step and waits for nothing that the device computes: it counts on its own copy of the batch, over
gloo, and whether an update is void is decided on the device.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.attention.documents import most_documents
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.clip import gradient_norm, scale_gradients
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.transfer import sent
from megatron_ltd.train.result import StepResult
from megatron_ltd.train.setup import Model


def train_step(model: Model, optimizer: ShardedOptimizer, batch: Sequence[dict[str, torch.Tensor]], config: RunConfig,
               plan: StepPlan, *, learning_rate: float, loss_scale: float | torch.Tensor, stop_level: int,
               device: torch.device, decoupled_rate: float | None = None, update: bool = True,
               tell: Sequence[float] = ()) -> StepResult:
    """One optimizer step on the microbatches of this data-parallel rank.

    The loss is the mean over the tokens of the global batch that the loss mask keeps, whichever microbatch they are in;
    with the sentence order, plus its mean over the samples; with the z-loss, plus its mean over the tokens.

    Args:
        batch: microbatches, as returned by the loader.
        plan: what the step computes; samples are truncated to its tokens of text.
        loss_scale: of fp16, a scalar on the device; 1 otherwise.
        decoupled_rate: learning rate of the word embedding and the head, with --decoupled-lr.
        update: False: compute everything and change nothing.
        tell: numbers for every process, as many on each; they travel with the counts (`StepResult.told`).
        stop_level: how urgently this process was asked to stop (0: not at all); every process receives the maximum.
    """
    parts = [in_bags(cut(part, plan.text_tokens), plan.fold) for part in batch]
    on_host = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts, stop_level, told = _global_counts(model, on_host["loss_mask"], stop_level, tell)
    met_at = time.time()
    merged = {name: sent(tensor, device) for name, tensor in on_host.items()}
    tokens = merged.pop("tokens")
    if model.importance is not None and plan.kept_tokens < tokens.shape[1]:
        merged["kept"] = model.importance.kept_positions(tokens, merged.get("padding_mask"), plan.kept_tokens,
                                                         config.token_drop.random_ltd_strata)
    optimizer.zero_grad()
    model.train_mode(plan)
    z_coefficient = config.training.z_loss_coeff
    divisors = [counts[0], counts[0] if z_coefficient else counts[1]]
    means = sent(1.0 / torch.tensor(divisors[:model.pipeline.loss_terms]), device)
    of_step: dict[str, Any] = {"plan": plan, "loss_record": model.loss_record}
    if config.model.mixture_of_depths_capacity is not None:  # a mean over the tokens of the global batch
        weight = loss_scale / (counts[1] * plan.read_tokens)
        # The engine splits tensors over the microbatches.
        of_step["router_weight"] = weight.expand(len(tokens)) if isinstance(weight, torch.Tensor) else weight
    if "document_ids" in on_host:
        of_step["most_documents"] = max(most_documents(part["document_ids"]) for part in parts)
    if z_coefficient:
        of_step["z_coefficient"] = z_coefficient
    sums = model.pipeline.train_step(tokens, merged | of_step, microbatches=len(batch),
                                     loss_weights=means * loss_scale)
    model.finish_gradients(plan)
    losses = _sum_over_processes(model, sums) * means.double()
    norm = gradient_norm(p.parameter for p in model.parameters if not p.is_copy) / loss_scale
    void = ~(norm.isfinite() & losses.isfinite().all())
    clip = config.optimizer.clip_grad
    coefficient = (clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0.0 else torch.ones_like(norm)
    scale_gradients((p.parameter for p in model.parameters), (coefficient / loss_scale).float())
    held = void if update else torch.ones_like(void)
    optimizer.step(learning_rate, held, decoupled_rate)
    _learn_importance(model, held)
    return StepResult(losses, norm, void, stop_level, sums, z_loss=bool(z_coefficient), told=told, met_at=met_at)


def cut(microbatch: dict[str, torch.Tensor], read_tokens: int) -> dict[str, torch.Tensor]:
    """The first tokens of each GPT sample, with their labels, masks and positions. Samples of other models are read
    whole.

    Shapes:
        [b, s] becomes [b, read_tokens]; [b] is unchanged
    """
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


def _global_counts(model: Model, loss_mask: torch.Tensor, stop_level: int,
                   tell: Sequence[float]) -> tuple[list[float], int, list[list[float]]]:
    """Numbers of unmasked tokens and of samples in the global batch, at least one each; the highest stop level; and
    what each process tells.

    They are known before the first forward pass, so that gradients are scaled correctly however the tokens are
    distributed over microbatches.
    """
    world = dist.get_world_size()
    numbers = torch.zeros(4 + world * len(tell), dtype=torch.float64)
    counts, told = numbers[:4], numbers[4:].view(world, len(tell))
    told[dist.get_rank()] = torch.tensor(tell, dtype=torch.float64)
    if model.mesh.pp_rank == 0 and model.mesh.tp_rank == 0:  # each data-parallel rank is counted once
        counts[0], counts[1] = loss_mask.double().sum(), len(loss_mask)
    counts[2], counts[3] = stop_level >= 1, stop_level >= 2  # processes at each level
    dist.all_reduce(numbers)
    predictions, samples, *asked = counts.tolist()
    return [max(predictions, 1.0), samples], sum(number > 0 for number in asked), told.tolist()


def _sum_over_processes(model: Model, sums: torch.Tensor) -> torch.Tensor:
    """The loss terms of the global batch. Every tensor-parallel rank of the last stage has them; the one that holds the
    first token contributes them to the sum."""
    speaks = model.pipeline.has_last and model.mesh.tp_rank == 0
    total = sums.double() if speaks else torch.zeros_like(sums, dtype=torch.float64)
    dist.all_reduce(total)
    return total


def _learn_importance(model: Model, void: torch.Tensor) -> None:
    """Update the importance table with the losses of the global batch: the same sums, and so the same table, on every
    process."""
    if model.importance is None or model.loss_record is None:
        return
    sums = model.loss_record.sums
    if not (model.pipeline.has_last and model.mesh.tp_rank == 0):
        sums.zero_()
    dist.all_reduce(sums)
    model.importance.update(sums * ~void)
    model.loss_record.clear()
