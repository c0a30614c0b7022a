"""Predicted and measured peak memory."""

from collections.abc import Sequence

from benchmarks.plan_accuracy.cases import CASES, Case
from benchmarks.plan_accuracy.processes import measure
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.memory import MemoryModel


def memory_table(cases: Sequence[Case] = CASES) -> str:
    """Predicted and measured peaks of the process of a pipeline with the largest error."""
    lines = ["| run | processes | predicted MB | live bytes, MB | error | resident, MB |", "|---|--:|--:|--:|--:|--:|"]
    worst = 0.0
    for case in cases:
        config, found = case.config, measure(case)
        layout = Layout.of(config, case.processes)
        model, plan = MemoryModel(config, layout, "cpu"), policies(config).plan(0)
        peaks = [(model.peak(rank, plan).total, found[rank * layout.dp * layout.tp]) for rank in range(layout.pp)]
        predicted, process = max(peaks, key=lambda pair: abs(pair[0] / pair[1].live_bytes - 1.0))
        error = predicted / process.live_bytes - 1.0
        worst = max(worst, abs(error))
        lines.append(f"| {case.name} | {case.processes} | {predicted / 1e6:.2f} | {process.live_bytes / 1e6:.2f} | "
                     f"{error:+.1%} | {process.resident_bytes / 1e6:.0f} |")
    return "\n".join([*lines, "", f"{len(cases)} runs, largest error {worst:.1%}"])
