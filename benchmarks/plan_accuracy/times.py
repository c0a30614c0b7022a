"""Predicted and measured times of a step, and how layouts are ranked by them."""

import itertools
from collections.abc import Sequence

from benchmarks.plan_accuracy.cases import TIMED_CASES, Case
from benchmarks.plan_accuracy.processes import measure
from megatron_ltd.plan.cluster import Cluster
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layout import Layout
from megatron_ltd.plan.roofline import Roofline

FITTED = 2
"""Cases, from the first on, to which the machine's constants are fitted."""


def predicted_seconds(case: Case, rates: tuple[float, float, float]) -> float:
    """Of a step, of the busiest process, without waiting for others.

    Args:
        rates: of products in TFLOP/s, of memory in GB/s, of a link in GB/s.
    """
    config = case.config
    cluster = Cluster(case.processes, "core", 1.0, rates[0], rates[1], case.processes, rates[2], rates[2],
                      product_efficiency=1.0, attention_efficiency=0.5, memory_efficiency=1.0, link_efficiency=1.0,
                      overlap=1e-9)
    roofline = Roofline(config, Layout.of(config, case.processes), cluster, policies(config))
    time = roofline.step(policies(config).plan(0))
    return time.busiest + time.data + time.update


def fitted_rates(measured: Sequence[float]) -> tuple[float, float, float]:
    """The three constants of the machine from two layouts: the least squared relative error over a grid."""
    def error(rates: tuple[float, float, float]) -> float:
        return sum((predicted_seconds(case, rates) / seconds - 1.0) ** 2
                   for case, seconds in zip(TIMED_CASES[:FITTED], measured, strict=True))

    grid = [(products, memory, link) for products in GRID for memory in (1, 2, 5, 10, 20) for link in (0.1, 0.3, 1, 3)]
    return min(grid, key=error)


GRID = [0.01 * 1.1**power for power in range(40)]


def time_table(rounds: int = 3) -> str:
    """Measured and predicted processor seconds of a step, and how many pairs of layouts are ranked right."""
    seconds = [_seconds(case, rounds) for case in TIMED_CASES]
    rates = fitted_rates(seconds[:FITTED])
    predicted = [predicted_seconds(case, rates) for case in TIMED_CASES]
    lines = ["| layout | predicted s | measured s | error |", "|---|--:|--:|--:|"]
    lines += [f"| {case.name}{' (fitted)' if place < FITTED else ''} | {guess:.3f} | {found:.3f} | "
              f"{guess / found - 1.0:+.0%} |"
              for place, (case, guess, found) in enumerate(zip(TIMED_CASES, predicted, seconds, strict=True))]
    pairs = list(itertools.combinations(range(len(TIMED_CASES)), 2))
    right = sum((predicted[one] < predicted[other]) == (seconds[one] < seconds[other]) for one, other in pairs)
    clear = [(one, other) for one, other in pairs if abs(seconds[one] / seconds[other] - 1.0) > 0.05]
    clearly = sum((predicted[one] < predicted[other]) == (seconds[one] < seconds[other]) for one, other in clear)
    constants = f"{rates[0] * 1000:.0f} GFLOP/s, {rates[1]} GB/s of memory, {rates[2]} GB/s of a link"
    return "\n".join([*lines, "", f"constants: {constants}; {right} of {len(pairs)} pairs ranked right "
                      f"({right / len(pairs):.0%}); of those that differ by more than 5%, {clearly} of {len(clear)} "
                      f"({clearly / len(clear):.0%})"])


def _seconds(case: Case, rounds: int) -> float:
    """Processor seconds of the busiest process in its fastest step after the first: unlike the time on the wall they
    hardly depend on what else the machine does."""
    found = measure(case, rounds + 1, memory=False)
    return max(min(process.processor_seconds[1:]) for process in found)
