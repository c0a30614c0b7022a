"""The best model of a run by its loss on the validation set, and when to stop looking for a better one.

    SAVE/best/iter_0000300/                       weights only, published like every checkpoint
    SAVE/best/latest_checkpointed_iteration.txt   so that --load SAVE/best takes it
"""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.config import RunConfig
from megatron_ltd.log import Console

FOLDER = "best"


@dataclass(frozen=True)
class BestSoFar:
    """What a run found so far; a part of its counters, so that it goes on where it stopped.

    Args:
        loss: the lowest validation loss; None before the first evaluation.
        step: where it was found.
        evaluations_since: in a row, without a lower one.
    """

    loss: float | None = None
    step: int = 0
    evaluations_since: int = 0

    def after(self, step: int, loss: float) -> "BestSoFar":
        """With one more evaluation; what is not a number is not better."""
        if loss == loss and (self.loss is None or loss < self.loss):
            return BestSoFar(loss, step)
        return BestSoFar(self.loss, self.step, self.evaluations_since + 1)

    def gives_up(self, patience: int | None) -> bool:
        return patience is not None and self.evaluations_since >= patience


def is_finetuning(config: RunConfig) -> bool:
    """Whether the run reads whole epochs, after which its best model is kept."""
    return config.training.epoch_samples is not None


def best_writer(config: RunConfig, group: dist.ProcessGroup | None, console: Console) -> CheckpointWriter | None:
    """Where the best model is kept: of it alone, in a folder of its own."""
    if not is_finetuning(config) or config.checkpoint.save is None:
        return None
    return CheckpointWriter(Path(config.checkpoint.save) / FOLDER, group, retain_interval=1 << 62, console=console,
                            retained=1)
