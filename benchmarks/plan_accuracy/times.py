"""Predicted and measured times of a step, and how layouts are ranked by them.

A layout is measured on processes of its own, in rounds: every layout once, then again, so that what else the machine
does falls on all of them. A time is the median over all steps but the first of each round.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.plan_accuracy.cases import BLIND_CASES, FITTED, TIMED_CASES, Case
from benchmarks.plan_accuracy.critical_path import communication_seconds, critical_seconds
from benchmarks.plan_accuracy.processes import measure
from megatron_ltd.plan.cluster import Cluster
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layout import Layout
from megatron_ltd.plan.roofline import Roofline, StepTime

TIE = 0.05
"""Layouts whose times differ by less count as tied; fixed before measuring."""


class Rates(NamedTuple):
    """A machine: products in TFLOP/s, memory and a link between processes in GB/s."""

    products: float
    memory: float
    link: float


class Timed(NamedTuple):
    """Seconds of a step: the critical path, half the range of its middle half, and communication of the busiest."""

    seconds: float
    spread: float
    communication: float


def predicted(case: Case, rates: Rates) -> StepTime:
    """The time of a step on such a machine: attention at half the rate of products, nothing overlaps, and gloo reduces
    everywhere before it scatters."""
    config = case.config
    cluster = Cluster(case.processes, "core", 1.0, rates.products, rates.memory, case.processes, rates.link, rates.link,
                      product_efficiency=1.0, attention_efficiency=0.5, memory_efficiency=1.0, link_efficiency=1.0,
                      overlap=1e-9, scatter_cost=2.0)
    found = policies(config)
    return Roofline(config, Layout.of(config, case.processes), cluster, found).step(found.plan(0))


def fitted_rates(measured: dict[str, Timed]) -> Rates:
    """The constants of the machine from two layouts: the link from the communication of one, the others from the
    times of both, by the least squared relative error over grids that grow finer."""
    plain, sharded = (next(case for case in TIMED_CASES if case.name == name) for name in FITTED)
    of_link = predicted(sharded, Rates(1.0, 1.0, 1.0)).data / measured[sharded.name].communication

    def error(rates: Rates) -> float:
        return sum((predicted(case, rates).seconds / measured[case.name].seconds - 1.0) ** 2
                   for case in (plain, sharded))

    best, steps = Rates(0.1, 4.0, of_link), range(-4, 5)
    for ratio in (2.0, 1.3, 1.1, 1.03):
        best = min((Rates(best.products * ratio**products, best.memory * ratio**memory, of_link)
                    for products in steps for memory in steps), key=error)
    return best


def measured_times(rounds: int, steps: int, cases: Sequence[Case] = TIMED_CASES) -> dict[str, Timed]:
    """Each layout's time from so many steps, after a first, in each of some rounds."""
    paths: dict[str, list[float]] = {case.name: [] for case in cases}
    talks: dict[str, list[float]] = {case.name: [] for case in cases}
    for _, case in itertools.product(range(rounds), cases):
        found = measure(case, steps + 1, memory=False)
        for step in range(1, steps + 1):
            notes = [process.notes[step] for process in found]
            paths[case.name].append(critical_seconds(notes))
            talks[case.name].append(max(map(communication_seconds, notes)))
    return {name: Timed(statistics.median(seconds), _spread(seconds), statistics.median(talks[name]))
            for name, seconds in paths.items()}


def _spread(seconds: Sequence[float]) -> float:
    first, _, third = statistics.quantiles(seconds, n=4)
    return (third - first) / 2


def time_table(rounds: int = 3, steps: int = 4) -> str:
    """Measured and predicted seconds of a step, and how many pairs of layouts are ranked right."""
    return compared(measured_times(rounds, steps))


def blind_table(rounds: int = 1, steps: int = 4) -> str:
    """The same of layouts whose predictions are printed before they are measured, after the two of the fit."""
    fitted = measured_times(rounds, steps, [case for case in TIMED_CASES if case.name in FITTED])
    rates = fitted_rates(fitted)
    print("\n".join(["predicted before measuring:", *(f"- {case.name}: {predicted(case, rates).seconds:.3f} s"
                                                       for case in BLIND_CASES)]), flush=True)
    return compared(fitted | measured_times(rounds, steps, BLIND_CASES))


def compared(measured: dict[str, Timed]) -> str:
    """The table and the ranking."""
    rates = fitted_rates(measured)
    cases = [case for case in (*TIMED_CASES, *BLIND_CASES) if case.name in measured]
    guesses = {case.name: predicted(case, rates).seconds for case in cases}
    lines = ["| layout | processes | predicted s | measured s | error | spread |", "|---|--:|--:|--:|--:|--:|"]
    for case in cases:
        guess, (seconds, spread, _) = guesses[case.name], measured[case.name]
        lines.append(f"| {case.name}{' (fitted)' if case.name in FITTED else ''} | {case.processes} | {guess:.3f} | "
                     f"{seconds:.3f} | {guess / seconds - 1.0:+.0%} | {spread / seconds:.1%} |")
    pairs = list(itertools.combinations(measured, 2))
    tied = {(one, other) for one, other in pairs
            if abs(measured[one].seconds / measured[other].seconds - 1.0) < TIE}
    wrong = [(one, other) for one, other in pairs
             if (guesses[one] < guesses[other]) != (measured[one].seconds < measured[other].seconds)]
    clear, errors = len(pairs) - len(tied), [pair for pair in wrong if pair not in tied]
    right = len(pairs) - len(wrong)
    lines += ["", f"constants: {rates.products * 1000:.0f} GFLOP/s, {rates.memory:.2g} GB/s of memory, "
              f"{rates.link:.2g} GB/s of a link", "",
              f"{right} of {len(pairs)} pairs ranked right ({right / len(pairs):.0%}); {len(tied)} pairs differ by "
              f"less than {TIE:.0%}; of the others {clear - len(errors)} of {clear} ({1 - len(errors) / clear:.0%})"]
    return "\n".join([*lines, *(f"- ranked wrongly: {one} and {other}" for one, other in errors)])
