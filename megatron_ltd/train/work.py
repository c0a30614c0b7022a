"""What each step of a run computes, and what that costs: made here once, from the settings."""

from dataclasses import dataclass

import torch

from megatron_ltd.config import RunConfig
from megatron_ltd.model.flops import work_flops
from megatron_ltd.plan.derived import (
    cross_layer,
    dropped_layers,
    kept_length,
    predictions_per_sample,
    sequence_length,
    skippable_layers,
)
from megatron_ltd.token_drop.sampling import skipped_layers
from megatron_ltd.token_drop.schedule import KeptSchedule
from megatron_ltd.token_drop.step_work import StepWork


@dataclass(frozen=True)
class WorkSchedule:
    """The work of every step: a pure function of the step.

    Args:
        dropped: layers that drop tokens.
        cross: the dropped layer, if any, that attends to all tokens.
        skippable: layers that LayerDrop may skip.
    """

    config: RunConfig
    kept: KeptSchedule
    sequence: KeptSchedule
    dropped: tuple[int, ...]
    cross: int | None
    skippable: tuple[int, ...]

    @classmethod
    def of_run(cls, config: RunConfig) -> "WorkSchedule":
        return cls(config, kept_length(config), sequence_length(config), dropped_layers(config), cross_layer(config),
                   skippable_layers(config))

    def at(self, step: int) -> StepWork:
        """The work of a step, counted from 0."""
        sequence_tokens = self.sequence.at(step)
        return StepWork(sequence_tokens, min(self.kept.at(step), sequence_tokens), self._skipped(step))

    def flops(self, work: StepWork) -> int:
        """Of one sample."""
        return work_flops(self.config.model, work, self.dropped, cross_layer=self.cross,
                          predictions=predictions_per_sample(self.config))

    def whole_flops(self, work: StepWork) -> int:
        """Of one sample of which as much is read, and all of that processed by every layer."""
        return self.flops(StepWork.whole(work.sequence_tokens))

    def _skipped(self, step: int) -> frozenset[int]:
        if not self.skippable:
            return frozenset()
        drawn = skipped_layers(self.config.training.seed, torch.tensor([step]), torch.tensor(self.skippable),
                               self.config.token_drop.layer_drop_rate)
        return frozenset(layer for layer, skips in zip(self.skippable, drawn[:, 0].tolist(), strict=True) if skips)
