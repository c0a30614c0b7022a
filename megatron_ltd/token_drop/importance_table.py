"""Token Dropping's choice of tokens: those with the largest running loss (https://arxiv.org/abs/2203.13240, section
3.2).

One fp32 number for each vocabulary id, the exponential moving average of the loss with which the id was predicted:

    importance[id] <- beta importance[id] + (1 - beta) mean loss of the id in the step      ids that were predicted
    kept = the k tokens of a sample whose ids have the largest importance; ties go to the earlier token

The importance of ids that are always kept or always dropped is fixed. The table is updated once per optimizer step, by
sums over the global batch, and is frozen within a step: every microbatch, stage and rank uses the same values, and so
does recomputation.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from megatron_ltd.token_drop.sampling import positions_of_largest

_FIXED_POINT = 1 << 20
"""Losses are summed as integers of this resolution, so that the sums do not depend on how the batch was split."""

_PINNED = 1e4
"""Importance of an id that is always kept; its negative is that of an id that is always dropped."""


class LossRecord:
    """Sums of the losses of one step by vocabulary id, on this process.

    Shapes:
        sums: [2, v] int64, losses in fixed point and their number
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self.sums = torch.zeros(2, vocab_size, dtype=torch.int64, device=device)

    def add(self, ids: torch.Tensor, losses: torch.Tensor, loss_mask: torch.Tensor) -> None:
        """Record the losses of predictions; masked ones do not count.

        Shapes:
            ids [n] int64, losses [n] fp32, loss_mask [n] fp32
        """
        counted = loss_mask > 0
        fixed = (losses.double().nan_to_num(0.0, 0.0, 0.0) * _FIXED_POINT).round().long()
        self.sums[0].index_add_(0, ids, fixed * counted)
        self.sums[1].index_add_(0, ids, counted.long())

    def clear(self) -> None:
        self.sums.zero_()


@dataclass
class ImportanceTable:
    """The importance of every vocabulary id, equal on all processes.

    Args:
        values: [v] fp32.
        beta: weight of the old value in the moving average.
        always_keep, always_drop: ids whose importance is fixed.
    """

    values: torch.Tensor
    beta: float
    always_keep: torch.Tensor
    always_drop: torch.Tensor

    @classmethod
    def initial(cls, vocab_size: int, *, initial_importance: float, beta: float, always_keep: Collection[int],
                always_drop: Collection[int], device: torch.device) -> "ImportanceTable":
        """The table before the first step."""
        values = torch.full((vocab_size,), initial_importance, dtype=torch.float32, device=device)
        keep, drop = (torch.tensor(sorted(ids), dtype=torch.int64, device=device) for ids in (always_keep, always_drop))
        table = cls(values, beta, keep, drop)
        table.pin()
        return table

    def pin(self) -> None:
        """Set the importance of the ids that are always kept or dropped."""
        self.values.index_fill_(0, self.always_keep, _PINNED).index_fill_(0, self.always_drop, -_PINNED)

    def update(self, sums: torch.Tensor) -> None:
        """Update the average by one step, from the sums over the global batch (`LossRecord.sums`)."""
        total, count = sums[0].double() / _FIXED_POINT, sums[1]
        moved = self.beta * self.values.double() + (1.0 - self.beta) * total / count.clamp(min=1)
        self.values.copy_(torch.where(count > 0, moved.float(), self.values))
        self.pin()

    def kept_positions(self, tokens: torch.Tensor, padding_mask: torch.Tensor | None, kept_tokens: int,
                       strata: int = 1) -> torch.Tensor:
        """Positions that the dropped layers keep of each sample, ascending; padding is dropped first.

        Args:
            kept_tokens: k; a multiple of `strata`.
            strata: equal spans of the sequence from each of which the k / strata most important tokens are kept.

        Shapes:
            tokens [b, s] int64, padding_mask [b, s] bool, True for real tokens -> [b, k] int64
        """
        priority = self.values[tokens]
        if padding_mask is not None:
            priority = priority.masked_fill(~padding_mask, float("-inf"))
        return positions_of_largest(priority, kept_tokens, strata)
