"""Means over seeds, their standard errors, and arms against a baseline."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from tools.comparison.arms import Arm
from tools.comparison.curves import COSTS, reach


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values.

    Args:
        standard_error: sample standard deviation (with count - 1) / sqrt(count); None for a single value.
    """

    mean: float
    standard_error: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Final loss of an arm minus that of the baseline.

    Args:
        method: `paired by seed`, `paired by order`, `Welch`, or `no error` where an arm has a single run.
    """

    mean: float
    standard_error: float | None
    method: str
    count: int


@dataclass(frozen=True)
class ArmSummary:
    """One row of the tables; where all runs diverged there are no numbers.

    Args:
        steps: the least and the greatest step of a last validation.
        costs: until the last validation, by the names in `COSTS`.
        ratios: costs in units of the baseline's.
        difference: None for the baseline.
        reached: of the runs that did not diverge, those that came down to the baseline's final loss.
        reach: what these had consumed by then.
        reach_ratios: the same in units of what the baseline consumed in all.
    """

    name: str
    seeds: int
    diverged: int
    steps: tuple[int, int] | None
    loss: Estimate | None
    perplexity: Estimate | None
    costs: dict[str, Estimate]
    ratios: dict[str, float | None]
    difference: Difference | None
    reached: int
    reach: dict[str, Estimate]
    reach_ratios: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """All arms against one of them.

    Args:
        target: mean final loss of the baseline; None where all of its runs diverged.
    """

    baseline: str
    target: float | None
    summaries: tuple[ArmSummary, ...]
    notes: tuple[str, ...]


def estimate(values: list[float]) -> Estimate:
    """Mean and standard error of at least one value."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error, len(values))


def difference(arm: Arm, baseline: Arm) -> Difference | None:
    """Final loss minus the baseline's: of the runs with the same seed if both arms have the same seeds, else Welch's.

    Runs whose seed is not known are taken to be paired as they were given. None: there is nothing to compare.
    """
    mine = {run.seed: run.curve.final.loss for run in arm.finite}
    other = {run.seed: run.curve.final.loss for run in baseline.finite}
    if not mine or not other:
        return None
    alike = (arm.seeds_known == baseline.seeds_known
             and {run.seed for run in arm.runs} == {run.seed for run in baseline.runs})
    both = sorted(mine.keys() & other.keys())
    if alike and len(both) > 1:
        found = estimate([mine[seed] - other[seed] for seed in both])
        return Difference(found.mean, found.standard_error,
                          "paired by seed" if arm.seeds_known else "paired by order", len(both))
    one, two = estimate(list(mine.values())), estimate(list(other.values()))
    if one.standard_error is None or two.standard_error is None:
        return Difference(one.mean - two.mean, None, "no error", min(one.count, two.count))
    return Difference(one.mean - two.mean, math.hypot(one.standard_error, two.standard_error), "Welch",
                      min(one.count, two.count))


def compare(arms: list[Arm], baseline: Arm) -> Comparison:
    """Every arm against `baseline`, which is one of them."""
    final = [run.curve.final for run in baseline.finite]
    target = fmean([point.loss for point in final]) if final else None
    spent = {name: fmean([point.costs[name] for point in final]) if final else None for name in COSTS}
    summaries = tuple(_summary(arm, baseline, target, spent) for arm in arms)
    return Comparison(baseline.name, target, summaries, tuple(_notes(arms, baseline)))


def _summary(arm: Arm, baseline: Arm, target: float | None, spent: dict[str, float | None]) -> ArmSummary:
    """A row.

    Args:
        spent: costs of the baseline.
    """
    final = [run.curve.final for run in arm.finite]
    perplexities = [point.perplexity for point in final if point.perplexity is not None]
    costs = {name: estimate([point.costs[name] for point in final]) for name in COSTS} if final else {}
    arrivals = [reach(run.curve, target) for run in arm.finite] if target is not None else []
    reached = [costs for costs in arrivals if costs is not None]
    reaching = {name: estimate([costs[name] for costs in reached]) for name in COSTS} if reached else {}
    return ArmSummary(
        name=arm.name, seeds=len(arm.runs), diverged=len(arm.runs) - len(final),
        steps=(min(point.step for point in final), max(point.step for point in final)) if final else None,
        loss=estimate([point.loss for point in final]) if final else None,
        perplexity=estimate(perplexities) if final and len(perplexities) == len(final) else None,
        costs=costs, ratios={name: _ratio(found.mean, spent[name]) for name, found in costs.items()},
        difference=None if arm is baseline else difference(arm, baseline),
        reached=len(reached), reach=reaching,
        reach_ratios={name: _ratio(found.mean, spent[name]) for name, found in reaching.items()},
    )


def _ratio(value: float, unit: float | None) -> float | None:
    return value / unit if unit else None


def _notes(arms: list[Arm], baseline: Arm) -> list[str]:
    """What a reader must know to read the numbers right."""
    notes = [
        "Only final losses are fair between budgets: under a learning rate that decays over the run, a loss in its "
        "middle is higher than that of a run that ended there. So the compute to reach the baseline's final loss, "
        "which is read off the curves, is more than a run planned to end there would need.",
        "± is the standard error over seeds: sample standard deviation (n - 1) / sqrt(n). A single seed has none. Of "
        "two or three seeds it is itself uncertain.",
        f"The baseline is {baseline.name}. Its own runs that ended above their mean may not reach that mean. Where "
        "only some runs of an arm reach it, the mean is over those, which flatters the arm.",
        "Hours are those of training steps as logged, on the machine of each run; without evaluation and saving.",
    ]
    for arm in arms:
        lost = len(arm.runs) - len(arm.finite)
        if lost:
            seeds = ", ".join(str(run.seed) for run in arm.runs if run.curve.diverged)
            notes.append(f"{arm.name}: {lost} of {len(arm.runs)} runs diverged (seed {seeds}) and "
                         f"{'is' if lost == 1 else 'are'} in no mean, which flatters the arm.")
        ended = [run for run in arm.finite if run.curve.final.step < run.curve.last_step]
        if ended:
            notes.append(f"{arm.name}: {len(ended)} of {len(arm.runs)} runs went on after their last validation, up to "
                         f"step {max(run.curve.last_step for run in ended)}; compared is that validation.")
        if len({(run.curve.final.step, run.curve.final.costs["raw_tokens"]) for run in arm.finite}) > 1:
            notes.append(f"{arm.name}: its runs have different lengths; their mean is the loss of none of them.")
    estimated = [arm.name for arm in arms if any(run.curve.flops_estimated for run in arm.runs)]
    if estimated:
        notes.append(f"FLOPs of {', '.join(estimated)} are estimated from the logged steps: the files are of a version "
                     "that did not count them.")
    cut = [str(run.curve.path) for arm in arms for run in arm.runs if run.curve.cut_line]
    if cut:
        notes.append(f"The last line of {', '.join(cut)} is incomplete and was left out: the run was killed, or is "
                     "still going on.")
    return notes
