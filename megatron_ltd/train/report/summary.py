"""What a run has consumed and saved, logged once at its end.

Savings in FLOPs are counted; savings in time are measured, and only if this process has run both kinds of steps: at the
full length and with dropped tokens.
"""

from dataclasses import dataclass, field

from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.token_drop.plan import StepPlan


@dataclass
class _Steps:
    """Steps of one kind; the first one is not timed, since it includes compilation and allocation."""

    seen: int = 0
    samples: int = 0
    seconds: float = 0.0
    flops: int = 0

    def add(self, samples: int, seconds: float, flops: int) -> None:
        self.seen += 1
        if self.seen > 1:
            self.samples, self.seconds, self.flops = self.samples + samples, self.seconds + seconds, self.flops + flops

    @property
    def seconds_per_sample(self) -> float:
        return self.seconds / self.samples


@dataclass
class StepTimes:
    """Step times of this process, at the full length and at smaller kept lengths or with skipped layers.

    Args:
        full_tokens: the sequence length; steps that read less are not compared with others.
        full_flops: FLOPs of one sample without dropping.
    """

    full_tokens: int
    full_flops: int
    full: _Steps = field(default_factory=_Steps)
    dropped: _Steps = field(default_factory=_Steps)
    fewest_tokens: int = 0
    most_tokens: int = 0
    most_skipped: int = 0
    steps: int = 0

    def add(self, plan: StepPlan, *, samples: int, seconds: float, sample_flops: int) -> None:
        """Count a step."""
        self.steps += 1
        if plan.read_tokens < self.full_tokens:
            return
        if plan.is_whole:
            self.full.add(samples, seconds, samples * sample_flops)
            return
        self.dropped.add(samples, seconds, samples * sample_flops)
        self.fewest_tokens = min(plan.kept_tokens, self.fewest_tokens or plan.kept_tokens)
        self.most_tokens = max(plan.kept_tokens, self.most_tokens)
        self.most_skipped = max(len(plan.skipped_layers), self.most_skipped)

    @property
    def time_saving(self) -> float | None:
        """Share of the time per sample saved in the steps that dropped tokens; None if not measured."""
        if not self.full.samples or not self.dropped.samples or self.full.seconds <= 0.0:
            return None
        return 1.0 - self.dropped.seconds_per_sample / self.full.seconds_per_sample

    @property
    def flops_saving(self) -> float:
        """Share of the FLOPs saved in the same steps."""
        return 1.0 - self.dropped.flops / (self.dropped.samples * self.full_flops) if self.dropped.samples else 0.0


def summary(consumed: Consumed, layers: int, times: StepTimes) -> list[str]:
    """The lines that end a run's log."""
    share = consumed.layer_tokens(layers) / max(1, consumed.tokens)
    lines = [f"consumed in {consumed.steps} steps: {consumed.tokens} raw tokens, {consumed.layer_tokens(layers)} layer "
             f"tokens ({100 * share:.1f}%), {consumed.flops:.4g} FLOPs; without dropping the same tokens take "
             f"{consumed.full_flops:.4g}: theoretical saving {100 * consumed.saving:.1f}%"]
    if not times.dropped.seen:
        return lines
    lengths = f"{times.fewest_tokens} to {times.most_tokens} of {times.full_tokens} tokens kept"
    if times.most_skipped:
        lengths += f" and up to {times.most_skipped} layers skipped"
    if times.time_saving is None:
        missing = "at the full length" if not times.full.samples else "with dropped tokens"
        lines.append(f"time saved: not measured, since this process timed no step {missing}")
        return lines
    lines.append(
        f"time saved: {100 * times.time_saving:.1f}% in steps with {lengths}, whose FLOPs fell by "
        f"{100 * times.flops_saving:.1f}% ({1000 * times.dropped.seconds_per_sample:.4g} ms a sample rather than "
        f"{1000 * times.full.seconds_per_sample:.4g} at the full length; {times.dropped.seen} and {times.full.seen} "
        "steps of this process)")
    return lines
