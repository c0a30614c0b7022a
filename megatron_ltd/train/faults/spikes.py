"""Loss spikes: how far a step's loss lies above those of the steps before it.

The scale is robust, since earlier spikes are in the window too. A new window starts where the policies' plan changes,
and with it what the loss means: at another kept length, bag size or stage.
"""

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ltd.train.faults.record import FaultRecord

LEAST_DEVIATION = 0.005
"""Share of the median; losses of very large batches are so smooth that harmless steps would stand out."""
ROLLBACKS = 5
"""From one checkpoint; a loss that still jumps without the samples of so many attempts is not due to them."""


@dataclass(frozen=True)
class SpikeWatch:
    """Scores the losses of a run.

    Args:
        window: losses in a full window; a quarter of them is enough for a score.
        changes: first steps of the stretches with one plan, from 0 on.
    """

    window: int
    changes: Sequence[int]

    def after(self, record: FaultRecord, step: int, loss: float) -> tuple[FaultRecord, float | None]:
        """The record with one more finite loss, and the score of the loss; None while the window is too short."""
        phase = bisect_right(self.changes, step - 1)
        losses = record.losses if phase == record.phase else ()
        score = z_score(losses, loss) if len(losses) >= max(2, self.window // 4) else None
        return replace(record, phase=phase, losses=(*losses, loss)[-self.window:]), score


def z_score(losses: Sequence[float], loss: float) -> float:
    """How many robust standard deviations a loss lies above the median of others."""
    median = statistics.median(losses)
    return (loss - median) / max(deviation(losses), LEAST_DEVIATION * abs(median), 1e-12)


def deviation(values: Sequence[float]) -> float:
    """The median distance from the median, times what makes it the standard deviation of normal values."""
    median = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - median) for value in values)


def suspects(step: int, after: int, rollbacks: int) -> range:
    """The steps whose samples are skipped after a spike: the step itself, whose samples may be odd, and those just
    before it, whose updates may have caused it; twice as many with each attempt from one checkpoint.

    Args:
        after: the step of the checkpoint.
        rollbacks: to it, so far.
    """
    return range(max(after + 1, step - 2**rollbacks), step + 1)
