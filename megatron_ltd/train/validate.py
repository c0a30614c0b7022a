"""The loss on held-out samples, with every token of every layer kept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist

from megatron_ltd.data.loader import Batch
from megatron_ltd.model.attention.documents import most_documents
from megatron_ltd.token_drop.transfer import sent
from megatron_ltd.train.setup import Model


@dataclass(frozen=True)
class HeldOut:
    """Metrics of a model on held-out samples.

    Args:
        loss: mean cross-entropy of the predicted tokens.
        sentence_order_loss: mean cross-entropy of the sentence order; None for models without that head.
        top1, top5: shares of images whose class is the most probable, or among the five most probable; None for other
            models.
    """

    loss: float
    sentence_order_loss: float | None = None
    top1: float | None = None
    top5: float | None = None


def mean_of(found: Sequence[HeldOut]) -> HeldOut:
    """The mean over sets of each metric that all of them have."""
    means: dict[str, Any] = {}
    for entry in fields(HeldOut):
        values = [getattr(each, entry.name) for each in found]
        means[entry.name] = None if None in values else sum(values) / len(values)
    return HeldOut(**means)


def held_out_loss(model: Model, batches: Iterable[Batch], device: torch.device) -> HeldOut:
    """The loss over the microbatches of all data-parallel ranks. The host waits once, at the end; what depends on the
    loss mask's values it looks up in its own copy.

    Args:
        batches: microbatches of this data-parallel rank, read as they are needed; every rank has the same number.
    """
    model.eval_mode()
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    family = model.stages[0].config.family
    classifies = family == "vit"
    for batch in batches:
        facts: dict[str, Any] = {name: sent(tensor, device) for name, tensor in batch.items()}
        real = batch["loss_mask"] > 0
        if family == "gpt":
            facts["asked"] = sent(real.t().flatten().nonzero()[:, 0], device)
        if "document_ids" in batch:
            facts["most_documents"] = most_documents(batch["document_ids"])
        scored = model.pipeline.forward(facts.pop("tokens"), facts)
        if scored is not None and model.mesh.tp_rank == 0:
            mask = facts["loss_mask"].double()
            losses = -scored[0].double()
            tokens = losses[:, :mask.shape[1]]
            samples = sent(real.any(dim=1).nonzero()[:, 0], device)
            order = losses[samples, mask.shape[1]:]  # without the samples that fill the last batch
            right = (scored[1:].double() * mask).sum(dim=(1, 2)) if classifies else mask.new_zeros(2)  # first, five
            sums += torch.stack(((tokens * mask).sum(), mask.sum(), order.sum(), order.new_tensor(order.numel()),
                                 *right))
    model.after_evaluation()
    dist.all_reduce(sums)
    loss, tokens_counted, order_loss, samples_counted, first, five = sums.tolist()
    counted = max(tokens_counted, 1.0)
    return HeldOut(loss / counted, order_loss / samples_counted if samples_counted else None,
                   first / counted if classifies else None, five / counted if classifies else None)
