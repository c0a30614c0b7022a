"""What a run remembers of its bad steps. It is saved with the counters, so that a resumed run decides as the
uninterrupted one."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class FaultRecord:
    """The bad steps of a run.

    Args:
        nonfinite: the last steps in a row whose update was skipped since something was not finite.
        skipped: steps whose samples are skipped because the loss jumped, ascending; the first step of a run is 1.
        phase: number of the stretch of the policies' plan that `losses` belongs to.
        losses: of its last steps, as many as the window holds; empty without --on-loss-spike.
    """

    nonfinite: int = 0
    skipped: tuple[int, ...] = ()
    phase: int = 0
    losses: tuple[float, ...] = ()

    def without(self, steps: Iterable[int]) -> "FaultRecord":
        """The record once the samples of these steps too are to be skipped."""
        return replace(self, skipped=tuple(sorted({*self.skipped, *steps})))
