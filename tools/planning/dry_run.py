"""Builds a process of a run on tensors without memory, and goes through one step of its schedule.

The process group is torch's fake one, in which every collective returns at once: shapes are those of the real run, and
values do not exist. What would fail for its shapes, placements or schedule fails here.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.build import build_datasets
from megatron_ltd.data.text.tokenizer import NullTokenizer
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import size_text
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.layers import local
from megatron_ltd.parallel.mesh import AXES, Mesh, build_mesh
from megatron_ltd.plan.derived import long_samples, policies, predictions_per_sample
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.memory import MemoryModel
from megatron_ltd.settings.checks.layout import needed_microbatches
from megatron_ltd.train.importance import importance_table
from megatron_ltd.train.live_bytes import LiveBytes
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.step import train_step
from tools.pages.report_page import Table
from tools.planning.answers import Answer
from tools.planning.inputs import Planned
from tools.planning.report import GROUPED, layout_text

MOST_ROUNDS = 2
"""Rounds of the pipeline that are gone through; a longer step repeats them. Of 1f1b, which repeats after a forward and
a backward pass, one round and two microbatches are enough."""


class Recorder(LiveBytes):
    """Counts live bytes, and collectives with their bytes by operation and axis."""

    def __init__(self) -> None:
        super().__init__()
        self.axes: dict[str, str] = {}
        self.collectives: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            key = func.__name__.split(".")[0].strip("_"), self._axis(args)
            self.collectives[key] += 1
            sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.bytes[key] += max(sizes, default=0) if "base" in func.__name__ else sum(sizes)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _axis(self, args: tuple[Any, ...]) -> str:
        for leaf in tree_leaves(args):
            if isinstance(leaf, torch.ScriptObject):
                try:
                    group = dist.ProcessGroup.unbox(leaf)
                except RuntimeError:  # another kind of object
                    continue
                return self.axes.get(group.group_name, f"{group.size()} processes")
        return "all"


@dataclass
class Dry:
    """What one process did.

    Args:
        microbatches: that were gone through.
        alike: other stages with layers of the same kinds, whose processes hold no more microbatches.
        shapes: of its parameters, the distinct ones of a layer with their names, and those outside the layers.
        problem: what failed; None if nothing did.
    """

    rank: int
    stage: int
    microbatches: int = 0
    alike: tuple[int, ...] = ()
    parameters: int = 0
    peak: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stream: tuple[int, ...] = ()
    collectives: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problem: str | None = None


def of_dry_run(planned: Planned, rank: int | None) -> Answer:
    """Raises:
        ConfigError: there is no such rank.
    """
    layout = Layout.of(planned.config, planned.cluster.gpus)
    if rank is not None and not 0 <= rank < layout.world_size:
        raise ConfigError(f"--rank = {rank}: the run has {layout.world_size} processes; choose 0 to "
                          f"{layout.world_size - 1}")
    plan = policies(planned.config).plan(0)
    predicted = MemoryModel(planned.config, replace(layout, microbatches=_enough(layout)), "cpu")
    if rank is None:
        stages = _different(planned.config, layout, [predicted.peak(stage, plan).total for stage in range(layout.pp)])
        runs = [replace(dry_run(planned.config, layout, stage * layout.dp * layout.tp), alike=alike)
                for stage, alike in stages.items()]
    else:
        runs = [dry_run(planned.config, layout, rank)]
    by_arithmetic = {run.rank: predicted.peak(run.stage, plan).total for run in runs}
    summary = Table("Dry run", ("process", "stage", "parameters", "live bytes", "by arithmetic", "result"), tuple(
        (str(run.rank), _stage_text(run), f"{run.parameters:,}", size_text(run.peak),
         size_text(by_arithmetic[run.rank]), run.problem or "ran") for run in runs))
    rows = [(f"{run.rank}", f"{name}, {axis}", f"{run.collectives[name, axis]:,}", size_text(run.bytes[name, axis]))
            for run in runs for name, axis in sorted(run.collectives)]
    moved = Table("Collectives of the steps that were gone through", ("process", "operation, axis", "calls", "bytes"),
                  tuple(rows))
    shapes = Table("Shapes on the first of these processes", ("tensor", "local shape"), (
        ("residual stream between stages", "x".join(map(str, runs[0].stream))),
        *((name, "x".join(map(str, shape))) for name, shape in runs[0].shapes.items())))
    failed = [run for run in runs if run.problem is not None]
    lines = [f"{runs[0].microbatches} of {layout.microbatches} microbatches were gone through, on tensors without "
             "memory; live bytes are those of a process on a CPU."]
    if any(run.alike for run in runs):
        lines.append("Of stages with layers of the same kinds one was gone through: that whose process needs most "
                     "memory by arithmetic. --rank goes through any other.")
    return Answer(f"Dry run: {layout_text(layout)}", [summary, moved, shapes], lines,
                  {"microbatches": layout.microbatches, "stream": runs[0].stream,
                   "processes": [_values(run) | {"predicted_bytes": by_arithmetic[run.rank]} for run in runs]},
                  problem=None if not failed else f"process {failed[0].rank} would have failed: {failed[0].problem}")


def _values(run: Dry) -> dict[str, Any]:
    moved = [{"operation": name, "axis": axis, "calls": count, "bytes": run.bytes[name, axis]}
             for (name, axis), count in run.collectives.items()]
    return {"rank": run.rank, "stage": run.stage, "alike": run.alike, "microbatches": run.microbatches,
            "parameters": run.parameters, "peak_live_bytes": run.peak, "shapes": run.shapes, "collectives": moved,
            "problem": run.problem}


def _enough(layout: Layout) -> int:
    """Microbatches to go through."""
    rounds = min(layout.pp + 2, MOST_ROUNDS * layout.pp) if layout.schedule == "1f1b" else MOST_ROUNDS * layout.pp
    return min(layout.microbatches, needed_microbatches(layout.schedule, layout.pp, rounds))


def _different(config: RunConfig, layout: Layout, peaks: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The stages of a pipeline's processes to go through, with those alike that are left out; all if there are few.

    Args:
        peaks: predicted bytes of each.
    """
    model, plan = config.model, policies(config).plan(0)
    kinds: dict[Any, list[int]] = {}
    for stage in range(layout.pp):
        spans = layout.stages(stage)
        layers = [(plan.layers[number], model.is_windowed(number), model.is_rotated(number), model.is_routed(number))
                  for first, stop in spans for number in range(first, stop)]
        ends = [(first == 0, stop - first, stop == model.num_layers) for first, stop in spans]
        kinds.setdefault(stage if layout.pp < GROUPED else (*layers, *ends), []).append(stage)
    most = {max(stages, key=peaks.__getitem__): stages for stages in kinds.values()}
    return {stage: tuple(other for other in most[stage] if other != stage) for stage in sorted(most)}


def _stage_text(run: Dry) -> str:
    if not run.alike:
        return str(run.stage)
    return f"{run.stage}, and {len(run.alike)} alike: {min(run.alike)} to {max(run.alike)}"


def dry_run(config: RunConfig, layout: Layout, rank: int) -> Dry:
    """One step of one process; whatever fails is what the result says."""
    run = Dry(rank, rank // (layout.dp * layout.tp))
    run.microbatches = _enough(layout)
    recorder = Recorder()
    try:
        with _without_memory(layout.world_size, rank), recorder:
            _go_through(config, layout, run, recorder)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, KeyError, AttributeError) as error:
        run.problem = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    run.peak, run.collectives, run.bytes = recorder.peak, recorder.collectives, recorder.bytes
    return run


@contextmanager
def _without_memory(world_size: int, rank: int) -> Iterator[None]:
    """A process of a fake run. What torch decides by values is decided outside of the mode that has none."""
    concatenate = DeviceMesh._concatenate

    def outside(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return concatenate(*args, **kwargs)

    with ExitStack() as stack:
        gc.freeze()  # what was imported need not be searched for garbage again and again
        stack.callback(gc.unfreeze)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # a fake group has no time limit
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size,
                                timeout=timedelta(minutes=1))
        stack.callback(dist.destroy_process_group)
        stack.enter_context(patch.object(DeviceMesh, "_concatenate", staticmethod(outside)))
        # The stages of a pipeline vote for shapes that are given; a vote has a value.
        stack.enter_context(patch.object(PipelineStage, "_warmup_backward_result",
                                         lambda stage, received_result=None: SimpleNamespace(item=lambda: 1)))
        stack.enter_context(patch("megatron_ltd.train.step._global_counts", _counts))
        stack.enter_context(patch("megatron_ltd.train.step.most_documents", len))  # one a sample: ids have no values
        yield


def _go_through(config: RunConfig, layout: Layout, run: Dry, recorder: Recorder) -> None:
    parallel, device = config.parallel, torch.device("cpu")
    mesh = build_mesh("cpu", pp=layout.pp, dp=layout.dp, tp=layout.tp,
                      shard_parameters=parallel.sharding != "no_shard", timeout=timedelta(minutes=1))
    recorder.axes = _axes(mesh)
    plan, sample = policies(config).plan(0), _sample(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config, mesh, device, draw=False)
        with unset_fake_temporarily():  # Muon's assigns matrices to processes, by the values of a mesh
            optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
        optimizer.state_tensors(0)  # moments, which all steps but the first find
        run.parameters = sum(local(p.parameter).numel() for p in model.parameters)
        first = min(p.layer for p in model.parameters if p.layer is not None)
        run.shapes = {p.name: tuple(local(p.parameter).shape) for p in model.parameters if p.layer in (None, first)}
        run.stream = model.pipeline.hidden_shape
        if config.token_drop.policy == "importance":
            model.choose_by(importance_table(config, _tokenizer(config), device))
        samples = layout.micro_samples
        microbatch = {name: torch.empty((samples, *values.shape), dtype=values.dtype)
                      for name, values in sample.items()} | {"sample_ids": torch.arange(samples)}
        batch = [microbatch] * run.microbatches
        train_step(model, optimizer, batch, config, plan, learning_rate=1e-3, loss_scale=1.0, stop_level=0,
                   device=device, decoupled_rate=config.optimizer.decoupled_lr)


def _sample(config: RunConfig) -> dict[str, torch.Tensor]:
    """One sample in the form of the run's."""
    model = config.model
    if model.family == "vit":
        assert model.num_channels and model.img_h and model.img_w
        return {"tokens": torch.empty(model.num_channels, model.img_h, model.img_w),
                "labels": torch.empty(1, dtype=torch.int64), "loss_mask": torch.empty(1)}
    longer = long_samples(config, 1)
    train = build_datasets(config, _tokenizer(config), 1 if longer is None else longer[0], 0, 0,
                           predictions_per_sample(config), longer).train
    return {name: torch.as_tensor(values) for name, values in train.sample(0).items()}


def _tokenizer(config: RunConfig) -> NullTokenizer:
    assert config.model.vocab_size is not None
    return NullTokenizer(config.model.vocab_size - 1)


def _counts(model: Any, loss_mask: torch.Tensor, stop_level: int,
            tell: Sequence[float]) -> tuple[list[float], int, list[list[float]]]:
    """In place of the numbers of tokens and samples in the global batch, which have no values here."""
    dist.all_reduce(torch.zeros(4, dtype=torch.float64))
    return [1.0, 1.0], stop_level, []


def _axes(mesh: Mesh) -> dict[str, str]:
    """What the processes of each group share, by the group's name."""
    names = {"pp": "pipeline", "dp_replicate": "data", "dp_shard": "data", "tp": "tensor"}
    found = {str(dist.group.WORLD.group_name): "all"}  # type: ignore[union-attr]
    return found | {str(mesh.world[axis].get_group().group_name): names[axis] for axis in AXES}
