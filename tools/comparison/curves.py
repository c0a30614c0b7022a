"""The validation curve of a run, with what the run had consumed at each of its points."""

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError
from tools.pages.metrics_file import is_number, read_metrics

COSTS = {"raw_tokens": "raw tokens", "layer_tokens": "layer tokens", "flops": "FLOPs", "hours": "hours"}
"""What a run consumes, by its name in table.json and in texts. Hours are those of training steps, as logged."""

NUMBERS = ("step", "consumed_tokens", "consumed_layer_tokens", "lm_loss", "step_seconds", "consumed_flops|model_flops")


@dataclass(frozen=True)
class Point:
    """One validation.

    Args:
        perplexity: None where it means nothing, as of an image classifier.
        costs: consumed until then, by the names in `COSTS`.
    """

    step: int
    loss: float
    perplexity: float | None
    costs: dict[str, float]


@dataclass(frozen=True)
class RunCurve:
    """One metrics file.

    Args:
        points: validations by step, of which a diverged run may have none.
        last_step: of its last step record.
        flops_estimated: FLOPs are summed from the logged steps, not counted by the run.
        cut_line: the last line is incomplete and was left out.
    """

    path: Path
    points: tuple[Point, ...]
    last_step: int
    diverged: bool
    flops_estimated: bool
    cut_line: bool

    @property
    def final(self) -> Point:
        return self.points[-1]


def read_run(path: Path) -> RunCurve:
    """The curve of a metrics file; where a step was repeated after a restart, its last record counts.

    Raises:
        DataError: the file is missing, damaged, holds two runs or the end of one, or has no validation.
    """
    records, cut = read_metrics(path, NUMBERS)
    # What a run logs of a step, and apart from it what it logs of the held-out set.
    training = {record["step"]: record for record in records if "lm_loss" in record}
    validation = {record["step"]: record for record in records if "validation_loss" in record}
    if not training:
        raise DataError(f"{path} has no step record. It must be the --metrics-file of a run with a logged step.")
    steps = sorted(training)
    totals = _totals(path, [training[step] for step in steps])
    points = tuple(_point(path, validation[step], [0, *steps], totals) for step in sorted(validation))
    diverged = _has_diverged(training[steps[-1]], points)
    if not points and not diverged:
        raise DataError(f"{path} has no validation record. Runs are compared by their validation loss: train with "
                        "--eval-interval and --eval-iters above 0 and a validation set.")
    return RunCurve(path, points, steps[-1], diverged,
                    any("consumed_flops" not in record for record in training.values()), cut)


def _totals(path: Path, records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What was consumed by step 0 and by each of the records, in the order of steps."""
    gaps = [after["step"] - before["step"] for before, after in itertools.pairwise(records)]
    if len(gaps) >= 2 and records[0]["step"] > 2 * max(gaps):
        raise DataError(f"{path} begins at step {records[0]['step']} and goes on every {max(gaps)} steps: its start is "
                        "missing, and with it what the run consumed until then. Put the parts of the run's metrics "
                        "file together.")
    totals = [dict.fromkeys(COSTS, 0.0)]
    step = 0
    for record in records:
        passed, before = record["step"] - step, totals[-1]
        now = {
            "raw_tokens": float(record["consumed_tokens"]),
            "layer_tokens": float(record["consumed_layer_tokens"]),
            "flops": float(record["consumed_flops"]) if "consumed_flops" in record
            else before["flops"] + passed * record["model_flops"],
            "hours": before["hours"] + passed * record["step_seconds"] / 3600.0,
        }
        for name, value in now.items():
            if not value >= before[name]:
                raise DataError(f"{path}: {COSTS[name]} are {before[name]:.6g} at step {step} and {value:.6g} at step "
                                f"{record['step']}. They must grow; if the file holds two runs, take them apart.")
        totals.append(now)
        step = record["step"]
    return totals


def _point(path: Path, record: dict[str, Any], steps: list[int], totals: list[dict[str, float]]) -> Point:
    """A validation, which knows its step only; between logged steps what a run consumes grows about linearly.

    Args:
        steps: 0 and the logged steps.
        totals: consumed by each of them.
    """
    step, loss = record["step"], float(record["validation_loss"])
    at = bisect_left(steps, step)
    if at == len(steps):
        raise DataError(f"{path} has a validation at step {step}, after its last step record, {steps[-1]}: what was "
                        "consumed by then is unknown. Take a file that also has the later steps.")
    costs = totals[at]
    if steps[at] != step:
        share = (step - steps[at - 1]) / (steps[at] - steps[at - 1])
        costs = between(totals[at - 1], totals[at], share)
    perplexity = None
    if "validation_top1" not in record:
        perplexity = record.get("validation_ppl")
        if not is_number(perplexity):
            perplexity = math.exp(min(loss, 700.0))
    return Point(step, loss, perplexity, costs)


def between(before: dict[str, float], after: dict[str, float], share: float) -> dict[str, float]:
    """Costs at `share` of the way from `before` to `after`."""
    return {name: before[name] + share * (after[name] - before[name]) for name in COSTS}


def _has_diverged(last: dict[str, Any], points: tuple[Point, ...]) -> bool:
    """Whether the run ended in a loss or gradient that is not finite, validated or not."""
    if points and not math.isfinite(points[-1].loss):
        return True
    if points and last["step"] <= points[-1].step:
        return False
    # With a loss scale, a gradient that overflows is an ordinary event.
    gradient = last.get("grad_norm", 0.0) if last.get("loss_scale", 1.0) == 1.0 else 0.0
    return not (math.isfinite(last["lm_loss"]) and (not is_number(gradient) or math.isfinite(gradient)))


def reach(curve: RunCurve, loss: float) -> dict[str, float] | None:
    """What a run had consumed when its validation loss first came down to `loss`, interpolated between validations.

    A run that is there at its first validation is charged all of what it had consumed by then. None: not reached.
    """
    before: Point | None = None
    for point in curve.points:
        if math.isfinite(point.loss) and point.loss <= loss:
            if before is None or not math.isfinite(before.loss):
                return point.costs
            return between(before.costs, point.costs, (before.loss - loss) / (before.loss - point.loss))
        before = point
    return None
