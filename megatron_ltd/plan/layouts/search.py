"""Which layouts of a run fit a cluster, and which of them is fastest."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_ltd.config.run import RunConfig
from megatron_ltd.parallel.partition import ZERO_BUBBLE, uniform_split
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layouts.activations import DTYPE_BYTES, Activations
from megatron_ltd.plan.layouts.cluster import Cluster
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.memory import Memory, MemoryModel
from megatron_ltd.plan.layouts.roofline import Roofline, StepTime
from megatron_ltd.token_drop.plan import StepPlan

MICRO_SAMPLES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "selective", "full")
SHARDING = ("no_shard", "optim_grads", "optim_grads_params")


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs.

    Args:
        memory: of the process that needs most, in the step that needs most.
        time: of that step; None where it does not fit.
        seconds: of a step, on average over the run.
    """

    layout: Layout
    memory: Memory
    time: StepTime | None
    seconds: float = 0.0


class Search:
    """All layouts of a run on a cluster.

    Layers are spread evenly. With tensor parallelism the sequence is sharded too wherever it can be, which takes no
    more time and less memory.

    Args:
        config: the run; its layout, microbatch and recomputation are not looked at.
        samples: of a global batch.
        shares: plans of the run's steps, with the share of the steps that each stands for.
        can_run: whether the checks of the settings accept a layout, whatever its sharding and recomputation.
    """

    def __init__(self, config: RunConfig, cluster: Cluster, samples: int, shares: Mapping[StepPlan, float],
                 can_run: Callable[[Layout], bool] = lambda layout: True):
        self.config, self.cluster, self.samples, self.shares = config, cluster, samples, shares
        self.can_run = can_run
        self.plan = max(shares, key=lambda plan: plan.layer_token_sum)
        self.policies = policies(config)
        self._sums: dict[Any, Any] = {}
        self._kept: dict[Any, Activations] = {}

    def layouts(self) -> Iterator[Layout]:
        """All that the engine can run, those that need less computation first."""
        gpus, layers = self.cluster.gpus, self.config.model.num_layers
        for tp in self._tensor_sizes():
            for pp in (pp for pp in range(1, layers + 1) if gpus // tp % pp == 0):
                dp = gpus // (tp * pp)
                for micro in (micro for micro in MICRO_SAMPLES if self.samples % (micro * dp) == 0):
                    count = self.samples // (micro * dp)
                    for schedule, chunks in self._schedules(pp, count):
                        whole = Layout(tp, pp, dp, schedule, tuple(uniform_split(layers, pp * chunks)), "no_shard",
                                       False, "none", micro, count)
                        sliced = [replace(whole, sequence_parallel=True)] if tp > 1 and self._slices(tp) else []
                        yield from self._variants(next(filter(self.can_run, [*sliced, whole]), None))

    def _slices(self, tp: int) -> bool:
        """Whether the sequence can be sharded; kept tokens are chosen in strata, which then must be a multiple."""
        drop = self.config.token_drop
        strata = drop.random_ltd_strata if any(plan.kept_tokens < plan.read_tokens for plan in self.shares) else tp
        return self.plan.read_tokens % tp == 0 and strata % tp == 0

    def _tensor_sizes(self) -> list[int]:
        model = self.config.model
        return [tp for tp in range(1, min(self.cluster.gpus_per_node, self.cluster.gpus) + 1)
                if self.cluster.gpus % tp == 0 and self.cluster.gpus_per_node % tp == 0
                and all(size % tp == 0 for size in (model.num_attention_heads, model.ffn, model.ngram_rows or 0))
                and (model.query_groups % tp == 0 or tp % model.query_groups == 0)
                and (model.vocab_size is None or model.padded_vocab_size % tp == 0)]

    def _schedules(self, pp: int, microbatches: int) -> Iterator[tuple[str, int]]:
        """Schedules that can run so many microbatches, with the chunks of a process."""
        layers = self.config.model.num_layers
        if pp == 1:
            yield "1f1b", 1
            return
        if microbatches >= pp:
            yield "1f1b", 1
        if layers >= 2 * pp:
            yield "zbv", 2
        if microbatches % max(1, microbatches // pp) == 0:
            for chunks in range(2, layers // pp + 1):
                if layers % (pp * chunks) == 0:
                    yield from (("interleaved", chunks), ("interleaved-zero-bubble", chunks))

    def _variants(self, layout: Layout | None) -> Iterator[Layout]:
        """Recomputation and sharding."""
        if layout is None:
            return
        zero_bubble = layout.schedule in ZERO_BUBBLE
        for sharding in SHARDING if layout.dp > 1 else SHARDING[:1]:
            for recompute in RECOMPUTE:
                whole = recompute != "none" or sharding != "no_shard" or self.config.training.compile
                if whole and layout.schedule == "interleaved-zero-bubble":
                    continue  # the same as interleaved
                yield replace(layout, sharding=sharding, recompute=recompute,
                              splits_backward=zero_bubble and not whole)

    def fitting(self) -> list[Candidate]:
        """The layouts that fit, fastest first."""
        found: list[Candidate] = []
        fits: set[Layout] = set()
        for layout in self.layouts():
            # Recomputing more than what fits already is slower.
            key = replace(layout, recompute="none", splits_backward=False)
            if key in fits:
                continue
            memory = self._memory_if_it_fits(layout)
            if memory is not None:
                fits.add(key)
                found.append(self.timed(layout, memory))
        return sorted(found, key=lambda candidate: (candidate.seconds, candidate.memory.total))

    def _memory_if_it_fits(self, layout: Layout) -> Memory | None:
        """Of the last, first or second process of a pipeline, whichever needs most; the cheapest checks come first."""
        model, room = self._model(layout), self.cluster.usable_bytes
        ends = (layout.pp - 1, 0, 1)[:layout.pp]
        if any(model.state(rank) > room for rank in ends):
            return None
        found: list[Memory] = []
        for rank in ends:
            found.append(model.peak(rank, self.plan))
            if found[-1].total > room:
                return None
        return max(found, key=lambda memory: memory.total)

    def memory(self, layout: Layout) -> Memory:
        """Of the process that needs most."""
        model = self._model(layout)
        return max((model.peak(rank, self.plan) for rank in range(layout.pp)), key=lambda found: found.total)

    def _model(self, layout: Layout) -> MemoryModel:
        return MemoryModel(self.config, layout, activations=self._activations(layout))

    def timed(self, layout: Layout, memory: Memory) -> Candidate:
        roofline = Roofline(self.config, layout, self.cluster, self.policies, self._sums, self._activations(layout))
        times = {id(plan): roofline.step(plan) for plan in self.shares}
        mean = sum(share * times[id(plan)].seconds for plan, share in self.shares.items())
        return Candidate(layout, memory, times[id(self.plan)], mean / sum(self.shares.values()))

    def _activations(self, layout: Layout) -> Activations:
        key = layout.tp, layout.micro_samples, layout.sequence_parallel, layout.recompute
        if key not in self._kept:
            self._kept[key] = Activations(self.config.model, layout, DTYPE_BYTES[self.config.training.precision])
        return self._kept[key]

    def least(self) -> Candidate | None:
        """The layout that needs the least memory, whether or not it fits; None if no layout can run."""
        found = ((max(self._model(layout).peak(rank, self.plan).total for rank in {0, layout.pp - 1}), number, layout)
                 for number, layout in enumerate(self.layouts()) if layout.recompute == "full")
        best = min(found, default=None)
        return None if best is None else Candidate(best[2], self.memory(best[2]), None)


def settings_of(layout: Layout) -> dict[str, Any]:
    """The settings of a run that has this layout, with layers spread evenly."""
    interleaved = layout.schedule.startswith("interleaved")
    return {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
            "pipeline_schedule": layout.schedule, "pipeline_split": "uniform",
            "sequence_parallel": layout.sequence_parallel,
            "num_layers_per_virtual_pipeline_stage": layout.split[0] if interleaved else None,
            "data_parallel_sharding_strategy": layout.sharding, "recompute_granularity": layout.recompute,
            "micro_batch_size": layout.micro_samples}


def laid_out(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The settings of a run with those of a layout in place of its own; what is no matter of layout stays."""
    chosen = dict(settings)
    training = replace(config.training, micro_batch_size=chosen.pop("micro_batch_size"))
    parallel = replace(config.parallel, use_distributed_optimizer=False, recompute_activations=False, **chosen)
    return replace(config, parallel=parallel, training=training)


def given_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that those of a layout replace."""
    parallel = config.parallel
    return {"tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "pipeline_schedule": parallel.pipeline_schedule, "pipeline_split": parallel.pipeline_split,
            "sequence_parallel": parallel.sequence_parallel,
            "num_layers_per_virtual_pipeline_stage": parallel.num_layers_per_virtual_pipeline_stage,
            "data_parallel_sharding_strategy": parallel.sharding, "recompute_granularity": parallel.recompute,
            "micro_batch_size": config.training.micro_batch_size}


def nearest(mine: dict[str, Any], candidates: list[Candidate]) -> Candidate | None:
    """The candidate that changes the fewest of these settings, the fastest of these."""
    return min(candidates, key=lambda candidate: (
        sum(mine[name] != value for name, value in settings_of(candidate.layout).items()), candidate.seconds),
        default=None)


MOST_DOUBLINGS = 16


def least_cluster(search: Search) -> tuple[Cluster, Candidate] | None:
    """The smallest cluster of the same kind, with a power of two times as many accelerators, that can hold the run, and
    its layout that needs least; if none can, the one on which a process needs least. None if no larger one can run it
    in any layout."""
    best: tuple[Cluster, Candidate] | None = None
    for power in range(1, MOST_DOUBLINGS + 1):
        larger = replace(search.cluster, gpus=search.cluster.gpus << power)
        least = Search(search.config, larger, search.samples, search.shares, search.can_run).least()
        if least is None:
            break
        if best is None or least.memory.total < best[1].memory.total:
            best = larger, least
        if least.memory.total <= larger.usable_bytes:
            break
    return best
