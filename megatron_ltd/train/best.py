"""The best model of a run by validation loss, and early stopping.

    SAVE/best/iter_0000300/                       weights only, published like any checkpoint
    SAVE/best/latest_checkpointed_iteration.txt   so that --load SAVE/best works
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.config.run import RunConfig
from megatron_ltd.log import Console

FOLDER = "best"


@dataclass(frozen=True)
class BestSoFar:
    """The best evaluation so far; saved with the run's counters, so that a resumed run continues from it.

    Args:
        loss: the lowest validation loss; None before the first evaluation.
        step: the step of that evaluation.
        evaluations_since: evaluations since then, none of them better.
    """

    loss: float | None = None
    step: int = 0
    evaluations_since: int = 0

    def after(self, step: int, loss: float) -> "BestSoFar":
        """The record after one more evaluation; a loss that is not finite never counts as better."""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            return BestSoFar(loss, step)
        return BestSoFar(self.loss, self.step, self.evaluations_since + 1)

    def gives_up(self, patience: int | None) -> bool:
        return patience is not None and self.evaluations_since >= patience


def is_finetuning(config: RunConfig) -> bool:
    """Whether the run reads whole epochs and keeps its best model."""
    return config.training.epoch_samples is not None


def best_writer(config: RunConfig, group: dist.ProcessGroup | None, console: Console) -> CheckpointWriter | None:
    """The writer that keeps the best model, and only that, in its own folder."""
    if not is_finetuning(config) or config.checkpoint.save is None:
        return None
    return CheckpointWriter(Path(config.checkpoint.save) / FOLDER, group, retain_interval=1 << 62, console=console,
                            retained=1)
