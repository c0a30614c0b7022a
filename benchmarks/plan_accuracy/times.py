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
from benchmarks.plan_accuracy.on_cpu import Rates, predicted
from benchmarks.plan_accuracy.processes import measure

TIE = 0.05
"""Layouts whose times differ by less count as tied; fixed before measuring."""


class Timed(NamedTuple):
    """Seconds of a step: the critical path, half the range of its middle half, and communication of the busiest."""

    seconds: float
    spread: float
    communication: float


def fitted_rates(measured: dict[str, Timed]) -> Rates:
    """The constants of the machine from two layouts: from the times of both, and the communication of one. Each follows
    from one of these measurements, given the others, so they are found in turns."""
    plain, sharded = (next(case for case in TIMED_CASES if case.name == name) for name in FITTED)
    rates = Rates(0.1, 1.0, 1e-3)
    for _ in range(50):
        rates = rates._replace(products=rates.products * predicted(plain, rates).seconds
                               / measured[plain.name].seconds)
        rates = rates._replace(link=max(0.1, min(100.0, rates.link * predicted(sharded, rates).data
                                                 / measured[sharded.name].communication)))
        missing = measured[sharded.name].seconds - predicted(sharded, rates).seconds
        alone = predicted(sharded, rates).seconds - predicted(sharded, rates._replace(host=0.0)).seconds
        rates = rates._replace(host=max(1e-6, rates.host * (1.0 + missing / alone)))
    return rates


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
    lines += ["", f"constants: {rates.products * 1000:.0f} GFLOP/s, {rates.link:.2g} GB/s of a link, "
              f"{rates.host * 1000:.1f} ms of the host for a layer and microbatch", "",
              f"{right} of {len(pairs)} pairs ranked right ({right / len(pairs):.0%}); {len(tied)} pairs differ by "
              f"less than {TIE:.0%}; of the others {clear - len(errors)} of {clear} ({1 - len(errors) / clear:.0%})"]
    return "\n".join([*lines, *(f"- ranked wrongly: {one} and {other}" for one, other in errors)])
