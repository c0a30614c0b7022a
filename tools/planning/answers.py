"""The planner's answers: about a given layout, and about all layouts."""

from dataclasses import dataclass, field, fields
from typing import Any

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import size_text
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.run_cost import run_cost, step_shares
from megatron_ltd.plan.layouts.search import (
    Candidate,
    Search,
    given_settings,
    laid_out,
    least_cluster,
    nearest,
    settings_of,
)
from megatron_ltd.settings.checks.all import violations
from tools.commands.run_flags import flags_of
from tools.pages.report_page import Table
from tools.planning.inputs import Planned
from tools.planning.report import (
    candidate_values,
    cluster_values,
    cost_values,
    gigabytes,
    hours_text,
    layout_text,
    ranking,
    report_of,
    report_values,
    tables,
)

BEST = 10
SECTIONS = tuple(field.name for field in fields(RunConfig))


@dataclass(frozen=True)
class Answer:
    """Args:
        lines: sentences and commands, after the tables.
        values: everything, unrounded.
        bars: a chart: title, unit, and a value by name.
        problem: why the run cannot be, and what can.
    """

    title: str
    tables: list[Table]
    lines: list[str]
    values: dict[str, Any]
    bars: tuple[str, str, dict[str, float]] | None = None
    problem: str | None = None
    stacks: dict[str, dict[str, float]] = field(default_factory=dict)


def of_layout(planned: Planned) -> Answer:
    """Memory, time and cost of the layout that the settings give."""
    report = report_of(planned)
    problem = None if report.fits else _too_large(planned, report.layout, report.peak)
    stacks = {f"stage {rank}": {kind: getattr(memory, kind) / 1e9 for kind in memory.__dataclass_fields__}
              for rank, memory in enumerate(report.memory)}
    return Answer(f"Plan: {layout_text(report.layout)} on {planned.cluster.gpus:,} x {planned.cluster.gpu}",
                  tables(report), precision_notes(planned), report_values(report), problem=problem, stacks=stacks)


def of_search(planned: Planned) -> Answer:
    """The fastest layouts.

    Raises:
        ConfigError: no layout fits.
    """
    search = search_of(planned)
    found = search.fitting()
    if not found:
        raise ConfigError(_nothing_fits(search))
    best, config, cluster = found[:BEST], planned.config, planned.cluster
    flops = sum(share * step_flops(config, plan) for plan, share in search.shares.items()) / sum(search.shares.values())
    tokens = sum(share * plan.text_tokens for plan, share in search.shares.items()) / sum(search.shares.values())
    ranked = [candidate_values(candidate, cluster, search.samples * flops, search.samples * tokens)
              for candidate in best]
    lines = [*precision_notes(planned), f"{len(found):,} layouts fit. The first one's command, with all that was "
             "given; what was not, such as corpus, checkpoints, length or --lr, is to be added:", "",
             command(planned, best[0].layout)]
    values = {"cluster": cluster_values(cluster), "layouts_that_fit": len(found), "best": ranked,
              "command": command(planned, best[0].layout)}
    if not planned.has_budget and policies(config).active:
        lines.insert(0, "No length of the run is given: times are of its first step, memory is of its largest.")
    if planned.has_budget:
        cost = run_cost(with_layout(config, best[0].layout), best[0].layout, cluster)
        lines.insert(0, f"The first one takes {cost.days:.3g} days, {hours_text(cost.gpu_hours)} GPU-hours.")
        values["run_of_the_first"] = cost_values(cost)
    return Answer(f"Search: {cluster.gpus:,} x {cluster.gpu}", [ranking(best, ranked)], lines, values,
                  ("Seconds of a step", "s", {
                      f"{place}. {layout_text(candidate.layout)}, microbatch {candidate.layout.micro_samples}":
                          candidate.seconds for place, candidate in enumerate(best, start=1)}))


def precision_notes(planned: Planned) -> list[str]:
    """What a time of a run in single precision is a time of."""
    if planned.config.training.precision != "fp32":
        return []
    return ["Neither --bf16 nor --fp16 is given: memory is that of fp32, but times and MFU take products at the 16-bit "
            "peak, which those of fp32 do not reach."]


def search_of(planned: Planned) -> Search:
    config, cluster = planned.config, planned.cluster
    samples = config.training.global_batch_size
    if samples is None:
        samples = config.training.micro_batch_size * Layout.of(config, cluster.gpus).dp
    dp = max(1, cluster.gpus // (config.parallel.tensor_model_parallel_size
                                 * config.parallel.pipeline_model_parallel_size))
    shares = step_shares(config, dp)
    if not planned.has_budget:  # memory must be enough to the end of every schedule
        shares.setdefault(max(policies(config).stretches, key=lambda plan: plan.layer_token_sum), 0.0)
    return Search(config, cluster, samples, shares,
                  lambda layout: not violations(with_layout(config, layout), layout.world_size))


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """The settings with a layout that a search found."""
    return laid_out(config, settings_of(layout))


def command(planned: Planned, layout: Layout) -> str:
    """The run with this layout, to paste."""
    cluster = planned.cluster
    # As many processes on each machine, in whole tensor-parallel groups, also where machines do not divide them.
    each = max(count for count in range(1, min(cluster.gpus, cluster.gpus_per_node) + 1)
               if cluster.gpus % count == 0 and count % layout.tp == 0)
    nodes = cluster.gpus // each
    launcher = f"torchrun --nnodes {nodes} --nproc-per-node {each}"
    if nodes > 1:
        launcher += " --rdzv-backend c10d --rdzv-endpoint $MASTER_ADDR:29500"
    flags = flags_of(with_layout(planned.given, layout), SECTIONS)
    return " \\\n    ".join([f"{launcher} -m megatron_ltd.{planned.recipe}", *flags])


def _too_large(planned: Planned, layout: Layout, peak: int) -> str:
    """Why a layout does not fit, and the nearest that does."""
    room = planned.cluster.usable_bytes
    says = (f"{layout_text(layout)}: a process needs {size_text(peak)}, and of {planned.cluster.memory_gb:g} GB "
            f"tensors may take {size_text(room)}")
    search = search_of(planned)
    close = nearest(given_settings(planned.config), search.fitting())
    if close is None:
        return f"{says}. {_nothing_fits(search)}"
    gpus = f"--gpus {planned.cluster.gpus} " if planned.gpus_follow else ""  # which would follow the new sizes
    return (f"{says}; the nearest settings that fit: {gpus}{changes(planned.config, close)} "
            f"({gigabytes(close.memory.total)} GB)")


def changes(config: RunConfig, candidate: Candidate) -> str:
    """The flags that, given after those of a run, make it this candidate."""
    mine = given_settings(config)
    different = {name: value for name, value in settings_of(candidate.layout).items() if mine[name] != value}
    for short, name, of_default in (("use_distributed_optimizer", "data_parallel_sharding_strategy", "no_shard"),
                                    ("recompute_activations", "recompute_granularity", "none")):
        if getattr(config.parallel, short) and different.get(name) == of_default:
            different[short] = False  # which would stand for another value in place of the default
    return " ".join(_said(name.replace("_", "-"), value) for name, value in different.items())


def _said(name: str, value: Any) -> str:
    """A setting as a flag, also one that is taken back."""
    if value is None or value is False:
        return f"--no-{name}"
    return f"--{name}" if value is True else f"--{name} {value}"


def _nothing_fits(search: Search) -> str:
    cluster, least = search.cluster, search.least()
    if least is None:
        return (f"No layout can run {search.samples} samples a step on {cluster.gpus} accelerators; choose a "
                "--global-batch-size, and steps of --rampup-batch-size, that more of their divisors divide")
    needs = (f"No layout fits {cluster.gpus:,} x {cluster.gpu}: the least that a process needs is "
             f"{size_text(least.memory.total)} ({layout_text(least.layout)}), and tensors may take "
             f"{size_text(cluster.usable_bytes)}")
    larger = least_cluster(search)
    if larger is not None and larger[1].memory.total <= cluster.usable_bytes:
        return (f"{needs}; the least of this kind that can hold it: {larger[0].gpus:,} "
                f"({layout_text(larger[1].layout)}, {gigabytes(larger[1].memory.total)} GB)")
    best, gpus = (least, cluster.gpus) if larger is None or larger[1].memory.total >= least.memory.total else (
        larger[1], larger[0].gpus)
    memory = best.memory.total / cluster.usable_memory
    return (f"{needs}. No number of this kind can hold it with --global-batch-size = {search.samples}: at the best, on "
            f"{gpus:,} ({layout_text(best.layout)}), an accelerator needs a memory of {gigabytes(memory)} GB; use such "
            "accelerators, or a larger --global-batch-size, which more of them can share")
