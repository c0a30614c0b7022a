"""What a plan comes to, as tables for people and as values for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_ltd.log import size_text
from megatron_ltd.model.arithmetic.shapes import parameter_count
from megatron_ltd.plan.derived import policies, total_steps
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.plan.layouts.cluster import Cluster
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.memory import Memory, MemoryModel, padded_parameter_count, parameters_text
from megatron_ltd.plan.layouts.roofline import Parts, Roofline, StepTime
from megatron_ltd.plan.layouts.run_cost import RunCost, run_cost
from megatron_ltd.plan.layouts.search import RECOMPUTE, Candidate, settings_of
from megatron_ltd.token_drop.plan import StepPlan
from tools.pages.report_page import Table
from tools.planning.inputs import Planned

KINDS = ("weights", "gradients", "optimizer", "activations", "head", "communication", "working")
GROUPED = 9
"""Processes of a pipeline that are listed one by one; of more only the different ones are."""


@dataclass(frozen=True)
class Step:
    """A step of the run, and what it takes."""

    name: str
    plan: StepPlan
    time: StepTime
    parts: Parts
    tokens_per_second: float
    mfu: float


@dataclass(frozen=True)
class Report:
    """A layout of a run on a cluster.

    Args:
        memory: of each process of a pipeline in the step that needs most.
        shortest: the same in the step that keeps the fewest tokens.
        peaks: bytes of the process that needs most, by recomputation, at the full and at the shortest kept length.
        costs: of the run by name: with dropping, and without if it drops.
    """

    planned: Planned
    layout: Layout
    memory: tuple[Memory, ...]
    shortest: tuple[Memory, ...]
    peaks: dict[str, tuple[int, int]]
    steps: tuple[Step, ...]
    costs: dict[str, RunCost]

    @property
    def peak(self) -> int:
        return max(memory.total for memory in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.planned.cluster.usable_bytes


def report_of(planned: Planned) -> Report:
    """Calculate everything about the layout that the settings give."""
    config, cluster = planned.config, planned.cluster
    layout = Layout.of(config, cluster.gpus)
    found = policies(config)
    plans = {"all tokens": found.whole}
    if found.active:
        plans |= {"first step": found.planned(0)}
        if planned.has_budget:
            plans |= {"last step": found.planned(total_steps(config, layout.dp) - 1)}
        else:
            plans |= {"longest step": max(found.stretches, key=lambda plan: plan.layer_token_sum)}
    most, least = (pick(found.stretches, key=lambda plan: plan.layer_token_sum) for pick in (max, min))
    peaks = {}
    for recompute in RECOMPUTE:
        model = MemoryModel(config, replace(layout, recompute=recompute,
                                            splits_backward=layout.splits_backward and recompute == "none"))
        peaks[recompute] = tuple(max(model.peak(rank, plan).total for rank in range(layout.pp))
                                 for plan in (most, least))
    model = MemoryModel(config, layout)
    ranks = range(layout.pp)
    costs = {}
    if planned.has_budget:
        costs["as planned"] = run_cost(config, layout, cluster)
        if found.active:
            costs["every token in every layer"] = run_cost(config, layout, cluster, whole=True)
    return Report(planned, layout, tuple(model.peak(rank, most) for rank in ranks),
                  tuple(model.peak(rank, least) for rank in ranks), peaks,  # type: ignore[arg-type]
                  tuple(_step(name, plan, planned, layout) for name, plan in plans.items()), costs)


def _step(name: str, plan: StepPlan, planned: Planned, layout: Layout) -> Step:
    cluster, config = planned.cluster, planned.config
    roofline = Roofline(config, layout, cluster, policies(config))
    time = roofline.step(plan)
    samples = layout.micro_samples * layout.microbatches * layout.dp
    peak = cluster.gpus * cluster.peak_tflops * 1e12
    return Step(name, plan, time, roofline.parts(plan), samples * plan.text_tokens / time.seconds,
                samples * step_flops(config, plan) / time.seconds / peak)


def tables(report: Report) -> list[Table]:
    found = [_run(report), _memory("Memory of a process at the full kept length", report.memory)]
    if report.shortest != report.memory:
        found.append(_memory("Memory of a process at the shortest kept length", report.shortest))
    found += [_peaks(report), _times(report)]
    return [*found, _costs(report)] if report.costs else found


def _run(report: Report) -> Table:
    layout, cluster, config = report.layout, report.planned.cluster, report.planned.config
    rows = [("parameters", parameters_text(config)),
            ("cluster", f"{cluster.gpus:,} x {cluster.gpu}, {cluster.memory_gb:g} GB of which tensors may take "
                        f"{size_text(cluster.usable_bytes)}"),
            ("layout", layout_text(layout)),
            ("microbatches", f"{layout.microbatches} of {layout.micro_samples}"),
            ("most memory of a process", f"{size_text(report.peak)}: "
                                         + ("fits" if report.fits else "does not fit"))]
    return Table("Run", ("", "value"), tuple(rows))


def layout_text(layout: Layout) -> str:
    """The layout in a few words."""
    sequence = " + sequence" if layout.sequence_parallel else ""
    schedule = "" if layout.pp == 1 else f", {layout.schedule}" + (f" ({layout.chunks} chunks)" if layout.chunks > 1
                                                                  else "")
    kinds = {"no_shard": "replicated", "optim_grads": "ZeRO-2", "optim_grads_params": "ZeRO-3"}
    return (f"tensor {layout.tp}{sequence} x pipeline {layout.pp} x data {layout.dp}{schedule}, "
            f"{kinds[layout.sharding]}, recompute {layout.recompute}")


def _memory(title: str, memories: Sequence[Memory]) -> Table:
    """One row for each process of the pipeline; neighbours that need the same are one row if there are many."""
    rows: list[tuple[int, int, Memory]] = []
    for rank, memory in enumerate(memories):
        if rows and len(memories) >= GROUPED and rows[-1][2] == memory:
            rows[-1] = rows[-1][0], rank, memory
        else:
            rows.append((rank, rank, memory))
    if len(rows) > GROUPED:
        rows = [*rows[:3], *rows[len(rows) // 2:len(rows) // 2 + 1], *rows[-3:]]
    return Table(f"{title}, GB", ("stage", *KINDS, "total"), tuple(
        (f"{first}" if first == last else f"{first}-{last}",
         *(gigabytes(getattr(memory, kind)) for kind in KINDS), gigabytes(memory.total))
        for first, last, memory in rows))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}" if count < 1e11 else f"{count / 1e9:.0f}"


def _peaks(report: Report) -> Table:
    room = report.planned.cluster.usable_bytes
    return Table("Most memory of a process by recomputation, GB", ("recompute", "full length", "shortest kept", "fits"),
                 tuple((name, gigabytes(full), gigabytes(shortest),
                        "yes" if full <= room else "shortest only" if shortest <= room else "no")
                       for name, (full, shortest) in report.peaks.items()))


def _times(report: Report) -> Table:
    """Seconds of the busiest process."""
    rows = []
    for step in report.steps:
        parts = step.parts
        rows.append((f"{step.name} ({_lengths(step.plan)})",
                     *(f"{value:.3g}" for value in (parts.products, parts.attention, parts.memory, parts.tensor,
                                                    parts.pipeline, step.time.waiting, step.time.data, step.time.update,
                                                    step.time.seconds)),
                     f"{step.time.bubble:.1%}", f"{step.tokens_per_second:,.0f}", f"{step.mfu:.1%}"))
    return Table("Seconds of a step", ("step", "products", "attention", "memory-bound", "tensor", "pipeline", "waiting",
                                       "data", "update", "in all", "bubble", "tokens/s", "MFU"), tuple(rows))


def _lengths(plan: StepPlan) -> str:
    """The tokens of a sample that a step computes, and the layers if it skips any."""
    kept, read, layers = plan.kept_tokens, plan.read_tokens, len(plan.layers)
    used = sum(not layer.skipped for layer in plan.layers)
    tokens = f"{kept:,} of {read:,} kept" if kept < read else f"all of {read:,}"
    return tokens + (f", {used} of {layers} layers" if used < layers else "")


def _costs(report: Report) -> Table:
    headers = ("run", "steps", "tokens", "days", "GPU-hours", "tokens/s", "tokens/day", "MFU")
    return Table("The whole run", headers, tuple(
        (name, f"{cost.steps:,}", f"{cost.tokens:.4g}", f"{cost.days:.3g}", hours_text(cost.gpu_hours),
         f"{cost.tokens_per_second:,.0f}", f"{86400 * cost.tokens_per_second:.4g}", f"{cost.mfu:.1%}")
        for name, cost in report.costs.items()))


def hours_text(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def report_values(report: Report) -> dict[str, Any]:
    """Everything, unrounded."""
    return {
        "parameters": parameter_count(report.planned.config.model),
        "padded_parameters": padded_parameter_count(report.planned.config),
        "cluster": cluster_values(report.planned.cluster),
        "layout": asdict(report.layout), "fits": report.fits, "peak_bytes": report.peak,
        "memory_bytes": [asdict(memory) | {"total": memory.total} for memory in report.memory],
        "memory_bytes_at_shortest_length": [asdict(memory) | {"total": memory.total} for memory in report.shortest],
        "peak_bytes_by_recomputation": {name: {"full_length": full, "shortest_kept_length": shortest}
                                        for name, (full, shortest) in report.peaks.items()},
        "steps": [{"name": step.name, "kept_tokens": step.plan.kept_tokens, "read_tokens": step.plan.read_tokens,
                   **asdict(step.time), "waiting": step.time.waiting, "parts": asdict(step.parts),
                   "tokens_per_second": step.tokens_per_second, "mfu": step.mfu} for step in report.steps],
        "runs": {name: cost_values(cost) for name, cost in report.costs.items()}}


def cluster_values(cluster: Cluster) -> dict[str, Any]:
    return asdict(cluster) | {"usable_bytes": cluster.usable_bytes}


def cost_values(cost: RunCost) -> dict[str, Any]:
    return {"steps": cost.steps, "tokens": cost.tokens, "flops": cost.flops, "seconds": cost.seconds, "days": cost.days,
            "gpu_hours": cost.gpu_hours, "tokens_per_second": cost.tokens_per_second,
            "tokens_per_day": 86400 * cost.tokens_per_second, "mfu": cost.mfu}


def candidate_values(candidate: Candidate, cluster: Cluster, step_flops_of_batch: float,
                     tokens: float) -> dict[str, Any]:
    """Args:
        tokens: of a step.
    """
    assert candidate.time is not None
    return {"settings": settings_of(candidate.layout), "layout": asdict(candidate.layout),
            "memory_bytes": asdict(candidate.memory) | {"total": candidate.memory.total},
            "step_seconds": candidate.seconds, "bubble": candidate.time.bubble,
            "tokens_per_second": tokens / candidate.seconds,
            "mfu": step_flops_of_batch / candidate.seconds / cluster.gpus / cluster.peak_tflops / 1e12}


def ranking(candidates: Sequence[Candidate], values: Sequence[dict[str, Any]]) -> Table:
    """The best layouts of a search."""
    rows = [(str(place), layout_text(candidate.layout), str(candidate.layout.micro_samples),
             gigabytes(candidate.memory.total), f"{candidate.seconds:.3g}", f"{found['bubble']:.1%}",
             f"{found['tokens_per_second']:,.0f}", f"{found['mfu']:.1%}")
            for place, (candidate, found) in enumerate(zip(candidates, values, strict=True), start=1)]
    return Table("Fastest layouts that fit", ("", "layout", "micro", "GB", "s/step", "bubble", "tokens/s", "MFU"),
                 tuple(rows))
