"""The loss on held-out samples, with every token of every layer kept."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ltd.data.loader import Batch
from megatron_ltd.train.setup import Model


def held_out_loss(model: Model, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean cross-entropy over the microbatches of all data-parallel ranks.

    Args:
        batches: microbatches of this data-parallel rank; every rank gives as many.
    """
    model.eval_mode()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        facts = {name: tensor.to(device) for name, tensor in batch.items()}
        scored = model.pipeline.forward(facts.pop("tokens"), facts)
        if scored is not None and model.mesh.tp_rank == 0:
            mask = facts["loss_mask"].double()
            sums += torch.stack(((-scored[0].double() * mask).sum(), mask.sum()))
    model.after_evaluation()
    dist.all_reduce(sums)
    loss, tokens = sums.tolist()
    return loss / max(tokens, 1.0)
