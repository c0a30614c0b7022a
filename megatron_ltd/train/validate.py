"""The loss on held-out samples, with every token of every layer kept."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.build import Datasets
from megatron_ltd.data.held_out import named_sets
from megatron_ltd.data.loader import Batch, read_microbatch, sample_ids
from megatron_ltd.data.sample import Dataset
from megatron_ltd.model.attention.documents import most_documents
from megatron_ltd.token_drop.transfer import sent
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.report.log_writers import Metrics
from megatron_ltd.train.result import HeldOut, mean_of
from megatron_ltd.train.setup import Model


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
            sums += torch.stack(((tokens * mask).sum(), mask.sum(), order.sum(), order.new_full((), order.numel()),
                                 *right))
    model.after_evaluation()
    dist.all_reduce(sums)
    loss, tokens_counted, order_loss, samples_counted, first, five = sums.tolist()
    counted = max(tokens_counted, 1.0)
    return HeldOut(loss / counted, order_loss / samples_counted if samples_counted else None,
                   first / counted if classifies else None, five / counted if classifies else None)


@dataclass(frozen=True)
class HeldOutSets:
    """The held-out sets of a run, whose losses go into its log.

    Args:
        batch_samples: samples of a global batch.
    """

    config: RunConfig
    runtime: Runtime
    model: Model
    datasets: Datasets
    metrics: Metrics
    batch_samples: int

    def validation(self, step: int) -> HeldOut | None:
        """The loss on the validation set after so many steps; with named sets, which are reported one by one, the mean
        of theirs; None without a sample."""
        sets = named_sets(self.datasets.valid)
        if "" in sets:
            return self._evaluate(sets[""], "validation", step)
        found = [self._evaluate(part, f"validation-{name}", step) for name, part in sets.items()]
        known = [each for each in found if each is not None]
        if not known:
            return None
        mean = mean_of(known)
        self.metrics.held_out("validation", step, mean)
        return mean

    def test(self, step: int) -> HeldOut | None:
        """The loss on the test set."""
        return self._evaluate(self.datasets.test, "test", step)

    def _evaluate(self, dataset: Dataset | None, name: str, step: int) -> HeldOut | None:
        """The loss on the first --eval-iters global batches of a set, or on all of it. The batches are the same every
        time, so that changes in the curve come from the model."""
        settings = self.config.logging
        if dataset is None:
            return None
        count = len(dataset) // self.batch_samples
        if not (settings.full_validation and name.startswith("validation")):
            count = min(count, settings.eval_iters)
        if count == 0:
            return None
        mesh, micro = self.runtime.mesh, self.config.training.micro_batch_size
        batches = (read_microbatch(dataset, ids)
                   for ids in sample_ids(0, count * self.batch_samples, micro, mesh.dp_rank, mesh.dp_size))
        found = held_out_loss(self.model, batches, self.runtime.device)
        self.metrics.held_out(name, step, found)
        return found
