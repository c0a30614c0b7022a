"""The log for people who watch: a line that fits 120 columns, and a progress bar below it on a terminal."""

import math
import time

from megatron_ltd.log import Console, duration_text
from megatron_ltd.train.report.metrics import StepReport

COLUMNS = 120
BAR_CELLS = 30
REDRAW_SECONDS = 0.5
MEMORY = 0.9
"""Weight of the earlier steps in the mean time of a step."""


class ShortLog:
    """Measures the pace of a run, and tells it."""

    def __init__(self, console: Console):
        self.console = console
        self._seen, self._step_seconds, self._drawn_at = 0, 0.0, 0.0

    def count(self, step: int, total_steps: int, seconds: float) -> None:
        """Count a step, and redraw the bar if that is due."""
        self._seen += 1
        if self._seen <= 2:  # the first includes compilation and allocation
            self._step_seconds = seconds
        self._step_seconds = MEMORY * self._step_seconds + (1.0 - MEMORY) * seconds
        now = time.monotonic()
        if now - self._drawn_at >= REDRAW_SECONDS:
            self._drawn_at = now
            self.console.status(bar(step, total_steps, self.seconds_left(step, total_steps)))

    def seconds_left(self, step: int, total_steps: int) -> float:
        """Time until the last step at the present pace."""
        return (total_steps - step) * self._step_seconds

    def line(self, report: StepReport) -> str:
        """The line of a step."""
        return short_line(report, self.seconds_left(report.consumed.steps, report.total_steps))


def short_line(report: StepReport, seconds_left: float) -> str:
    """Step, loss, rate, kept length, saving so far, speed, time left; what is not normal stands in the middle."""
    step, total = report.consumed.steps, report.total_steps
    parts = [f"{step:>{len(str(total))}}/{total}", f"loss {report.loss:.4f}"]
    if report.sentence_order_loss is not None:
        parts.append(f"order {report.sentence_order_loss:.3f}")
    parts.append(f"lr {report.learning_rate:.2e}")
    if report.skipped:
        parts.append(f"STEP SKIPPED, loss scale {report.loss_scale:g}")
    elif not math.isfinite(report.gradient_norm):
        parts.append(f"GRADIENT NORM {report.gradient_norm}")
    if report.plan.kept_tokens < report.plan.read_tokens:
        parts.append(f"kept {report.plan.kept_tokens}/{report.plan.read_tokens}")
    if report.consumed.saving > 0.0:
        parts.append(f"saved {100 * report.consumed.saving:.1f}%")
    parts.append(f"{count_text(report.fields()['tokens_per_second'])} tokens/s")
    if step < total:
        parts.append(f"{duration_text(seconds_left)} left")
    return " | ".join(parts)[:COLUMNS]


def bar(step: int, total_steps: int, seconds_left: float) -> str:
    """How far a run is."""
    filled = BAR_CELLS * step // total_steps
    return (f"[{'#' * filled}{'.' * (BAR_CELLS - filled)}] {100 * step // total_steps}% | step {step}/{total_steps} | "
            f"{duration_text(seconds_left)} left")


def count_text(count: float) -> str:
    """A number in three digits: `1.23M`."""
    power = min(4, max(0, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.3g}" + ("", "k", "M", "G", "T")[power]
