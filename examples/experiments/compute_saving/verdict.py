"""What the final losses say: differences between arms with their error bars, and the compute that an arm saves.

Seeds are pairs: two arms with one seed start from the same weights and read the same samples in the same order. The
interval is Student's t at 95%, so that three seeds count as the three they are.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STUDENT_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95% quantiles for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; without error for one seed."""

    mean: float
    standard_error: float | None
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, by Student's t."""
        if self.standard_error is None or not 2 <= self.seeds <= len(STUDENT_T_95) + 1:
            return None
        half = STUDENT_T_95[self.seeds - 2] * self.standard_error
        return self.mean - half, self.mean + half

    def text(self, digits: int = 4, sign: str = "+", scale: float = 1.0, unit: str = "") -> str:
        if self.standard_error is None:
            return f"{self.mean * scale:{sign}.{digits}f}{unit} (one seed)"
        return f"{self.mean * scale:{sign}.{digits}f} ± {self.standard_error * scale:.{digits}f}{unit}"


def estimate(values: Sequence[float]) -> Estimate:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def difference(losses: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Loss minus the baseline's, over the seeds that both have."""
    return estimate([losses[seed] - baseline[seed] for seed in sorted(losses.keys() & baseline.keys())])


def in_words(found: Estimate) -> str:
    """What a difference of losses says; lower is better."""
    interval = found.interval
    if interval is None:
        return "one seed, so no error bar"
    low, high = interval
    if low > 0:
        return f"worse: the 95% interval is {low:+.3f} to {high:+.3f}"
    if high < 0:
        return f"better: the 95% interval is {low:+.3f} to {high:+.3f}"
    return f"undecided: the 95% interval, {low:+.3f} to {high:+.3f}, holds zero"


def compute_saved(losses: Mapping[int, float], flops: float, short: tuple[Mapping[int, float], float],
                  long: tuple[Mapping[int, float], float]) -> Estimate | None:
    """Share of the FLOPs that a dense run of the same final loss would have spent more.

    A dense run's final loss is taken to fall linearly with the logarithm of its FLOPs, through its two budgets, seed by
    seed; so losses outside of these two are extrapolated.

    Args:
        flops: of the arm.
        short, long: losses by seed and FLOPs of the two dense arms.

    Returns:
        1 - flops / dense FLOPs of equal loss, negative where the arm costs more; None if more compute did not help.
    """
    saved = []
    for seed in sorted(losses.keys() & short[0].keys() & long[0].keys()):
        fall = short[0][seed] - long[0][seed]
        if fall <= 0:
            return None
        logarithm = math.log(short[1]) + (short[0][seed] - losses[seed]) / fall * math.log(long[1] / short[1])
        saved.append(1.0 - flops / math.exp(logarithm))
    return estimate(saved) if saved else None
