"""The pipeline's stages: the layers of each, the work of each process in FLOPs, and the resulting speed.

Dropped layers cost less, and the policy decides where they are, independent of the stages: with equal stages the
process that holds the most full layers, or the head, sets the pace. FLOPs, rather than kept lengths, are averaged over
the run, since attention is quadratic; the embedding is a lookup and counts as free.

    time of a step    m max + e (sum - max)       m microbatches; max and sum over processes, of one microbatch's work
    e                 1 under 1f1b; with v chunks per process 1/v under interleaved schedules and zbv
                      1/(3 v) and 0 where the backward pass is split in two (https://arxiv.org/abs/2401.10241)
    at least          sum + (m - 1) max / v, since a microbatch passes through all stages, one after the other; it
                      counts if there are fewer microbatches than processes; 2/3 of it where the pass is split in two
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.flops import cut_to, head_flops, layer_flops
from megatron_ltd.parallel.balance import balanced_split, rank_costs
from megatron_ltd.parallel.partition import ZERO_BUBBLE, uniform_split
from megatron_ltd.plan.derived import (
    global_batch_size,
    layer_tokens,
    parse_pipeline_split,
    policies,
    predictions_per_sample,
    total_steps,
    virtual_chunks,
    whole_backward,
)
from megatron_ltd.token_drop.plan import StepPlan

WASTE = 0.1
"""Loss of throughput above which a warning suggests a better split."""


@dataclass(frozen=True)
class Prediction:
    """Work and speed of a split.

    Args:
        shares: the work of each process over the run, as a multiple of the mean.
        seconds: time per sample, up to a constant factor.
        bubble: share of the time in which processes are idle.
    """

    shares: tuple[float, ...]
    seconds: float
    bubble: float


@lru_cache(maxsize=16)
def pipeline_layers(config: RunConfig, dp: int) -> tuple[int, ...]:
    """Layers of each stage, in order of depth, as set by --pipeline-split.

    Args:
        dp: data-parallel size, from which the length of the run may follow.
    """
    split = parse_pipeline_split(config.parallel.pipeline_split)
    if split is not None:
        return split
    if config.parallel.pipeline_split == "auto":
        return best_split(config, dp)
    return _uniform(config)


@lru_cache(maxsize=16)
def best_split(config: RunConfig, dp: int) -> tuple[int, ...]:
    """Layers of each stage such that the busiest process has the least work."""
    pp = config.parallel.pipeline_model_parallel_size
    totals, head = [0] * config.model.num_layers, 0
    for plan, samples in plan_samples(config, dp).items():
        totals = [total + samples * cost for total, cost in zip(totals, layer_costs(config, plan), strict=True)]
        head += samples * head_cost(config, plan)
    return tuple(balanced_split(totals, head, config.parallel.pipeline_schedule, pp, virtual_chunks(config)))


def plan_samples(config: RunConfig, dp: int) -> dict[StepPlan, int]:
    """Samples of the run by plan; layers that are skipped at random count as not skipped."""
    plans = policies(config).stretches
    if len(plans) == 1:
        return {plans[0]: 1}
    counts: Counter[StepPlan] = Counter()
    for steps, stretch in layer_tokens(config, dp).within(total_steps(config, dp)):
        counts[stretch.plan] += steps * stretch.batch_samples
    return dict(counts)


def layer_costs(config: RunConfig, plan: StepPlan) -> list[int]:
    """FLOPs of each layer for one sample: forward, backward, and a second forward if layers are recomputed; the
    expected FLOPs for layers that may be skipped."""
    model, expected = cut_to(config.model, plan.read_tokens), policies(config)
    passes = 4 if config.parallel.recompute == "full" else 3
    costs = []
    for number, layer in enumerate(plan.layers):
        cost = 0 if layer.skipped else passes * layer_flops(model, layer.tokens, attends_to_all=layer.attends_to_all,
                                                            windowed=model.is_windowed(number))
        share = expected.share(number)
        costs.append(cost if share == 1.0 else round(cost * share))
    return costs


def head_cost(config: RunConfig, plan: StepPlan) -> int:
    """FLOPs of the head for one sample, forward and backward."""
    return 3 * head_flops(cut_to(config.model, plan.read_tokens), predictions_per_sample(config))


def predict(config: RunConfig, dp: int, split: tuple[int, ...]) -> Prediction:
    """Evaluate the work and speed of a split."""
    pp, schedule = config.parallel.pipeline_model_parallel_size, config.parallel.pipeline_schedule
    microbatches = global_batch_size(config, dp) // (config.training.micro_batch_size * dp)
    splits = schedule in ZERO_BUBBLE and not whole_backward(config, dp)
    totals, seconds, samples_of_run = [0] * pp, 0.0, 0
    for plan, samples in plan_samples(config, dp).items():
        costs = rank_costs(split, layer_costs(config, plan), head_cost(config, plan), schedule, pp)
        totals = [total + samples * cost for total, cost in zip(totals, costs, strict=True)]
        seconds += samples * pipeline_time(costs, microbatches, schedule, virtual_chunks(config), splits) / microbatches
        samples_of_run += samples
    mean = sum(totals) / pp
    return Prediction(tuple(cost / mean for cost in totals), seconds / samples_of_run, 1.0 - mean / seconds)


def describe(config: RunConfig, dp: int) -> tuple[str, str | None]:
    """A log line about the stages, and a warning if another split would be much faster.

    Expects more than one stage, and a known vocabulary.
    """
    split, best, uniform = pipeline_layers(config, dp), best_split(config, dp), _uniform(config)
    found, possible, equal = predict(config, dp, split), predict(config, dp, best), predict(config, dp, uniform)
    pp = config.parallel.pipeline_model_parallel_size
    microbatches = global_batch_size(config, dp) // (config.training.micro_batch_size * dp)
    line = (f"pipeline: layers {_text(split)}; work of the processes {' '.join(f'{s:.2f}' for s in found.shares)} of "
            f"the mean; predicted bubble {100 * found.bubble:.1f}% with {microbatches} microbatches, throughput "
            f"{equal.seconds / found.seconds:.2f} x that of a uniform split")
    if possible.seconds > found.seconds * (1.0 - WASTE):
        return line, None
    return line, (f"--pipeline-split = {config.parallel.pipeline_split}: the busiest of {pp} processes has "
                  f"{max(found.shares):.2f} x the mean work; --pipeline-split auto ({_text(best)}) is predicted to be "
                  f"{found.seconds / possible.seconds:.2f} x as fast")


def _uniform(config: RunConfig) -> tuple[int, ...]:
    return tuple(uniform_split(config.model.num_layers,
                               config.parallel.pipeline_model_parallel_size * virtual_chunks(config)))


def pipeline_time(works: Sequence[float], microbatches: int, schedule: str, chunks: int, splits: bool) -> float:
    """Time of a step, in the unit of the work.

    Args:
        works: of each process on one microbatch.
        chunks: model chunks of a process.
        splits: the backward pass is split in two.
    """
    most, total = max(works), sum(works)
    exposed = 1.0 if schedule == "1f1b" else 1.0 / chunks
    if splits:
        exposed = 0.0 if schedule == "zbv" else exposed / 3.0
    in_turn = (total + (microbatches - 1) * most / chunks) * (2.0 / 3.0 if splits else 1.0)
    return max(microbatches * most + exposed * (total - most), in_turn)


def _text(split: tuple[int, ...]) -> str:
    return ",".join(str(count) for count in split)
