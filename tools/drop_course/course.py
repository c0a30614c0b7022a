"""What a run computes over its steps, from its settings alone.

Without random draws everything is exact: the plan is constant over stretches of steps. Drawn plans are made step by
step; of a run with more than `DRAWN_STEPS` steps as many are drawn, each of which stands for its neighbours.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import batch_ramp, layer_tokens, policies, total_steps
from megatron_ltd.plan.flops import step_flops, whole_step_flops
from megatron_ltd.plan.learning_rate import LearningRate
from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.token_drop.plan import StepPlan

ROWS = 12
DRAWN_STEPS = 4096
MEAN_STEPS = 64
"""Steps over which drawn quantities of a row are averaged, fewer in a short run."""


class Work(NamedTuple):
    """Steps with one batch size and one plan."""

    first_step: int
    steps: int
    batch_samples: int
    plan: StepPlan


@dataclass(frozen=True)
class Row:
    """The state of the run before a step, and what the step does.

    Args:
        learning_rate: None if --lr is not given.
        saving: share of the step's FLOPs that is saved.
        forward, backward: number of layers that run, and that have a backward pass.
    """

    step: int
    plan: StepPlan
    before: Consumed
    learning_rate: float | None
    saving: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Course:
    """The whole run.

    Args:
        works: all steps, in order.
        before: counters before each of `works`, and at the end.
    """

    config: RunConfig
    dp: int
    works: tuple[Work, ...]
    before: tuple[Consumed, ...]

    @classmethod
    def of(cls, config: RunConfig, dp: int) -> "Course":
        works, before = tuple(_works(config, dp)), [Consumed()]
        for work in works:
            before.append(_with(config, before[-1], work, work.steps))
        return cls(config, dp, works, tuple(before))

    @property
    def steps(self) -> int:
        return self.works[-1].first_step + self.works[-1].steps

    @property
    def layers(self) -> int:
        return self.config.model.num_layers

    def after(self, steps: int) -> Consumed:
        """The counters after the first `steps` steps; their own number of steps is not kept."""
        index = bisect_right(self.works, steps, key=lambda work: work.first_step) - 1
        return _with(self.config, self.before[index], self.works[index], steps - self.works[index].first_step)

    def mean(self, value: Callable[[StepPlan], float]) -> float:
        """The mean of a value of the plan over the tokens that are read."""
        weights = [work.steps * work.batch_samples * work.plan.read_tokens for work in self.works]
        return sum(weight * value(work.plan) for weight, work in zip(weights, self.works, strict=True)) / sum(weights)

    def rows(self, count: int = ROWS) -> Iterator[Row]:
        """Evenly spaced steps, including the first and the last."""
        last, found, ramp = self.steps - 1, policies(self.config), batch_ramp(self.config, self.dp)
        rate = None if self.config.optimizer.lr is None else LearningRate.of_run(self.config, self.dp)
        for step in sorted({last * number // (count - 1) for number in range(count)}):
            mean = min(MEAN_STEPS, max(1, self.steps // count)) if found.is_drawn else 1
            drawn = range(step, min(step + mean, self.steps))
            plans, samples = [found.plan(number) for number in drawn], ramp.samples_after(step)
            whole = sum(whole_step_flops(self.config, plan) for plan in plans)
            yield Row(step, plans[0], self.after(step),
                      None if rate is None else rate.at(step, samples, ramp.at(samples)),
                      1.0 - sum(step_flops(self.config, plan) for plan in plans) / whole,
                      sum(not layer.skipped for plan in plans for layer in plan.layers) / len(plans),
                      sum(layer.learns for plan in plans for layer in plan.layers) / len(plans))

    @property
    def dropped(self) -> set[int]:
        """Layers that drop tokens in at least one step."""
        return {number for work in self.works for number, layer in enumerate(work.plan.layers)
                if layer.token_set is not None}

    def visits(self) -> float:
        """Mean number of times that a dropped layer processes a token."""
        dropped = self.dropped
        return self.mean(lambda plan: sum(plan.layers[layer].processed_tokens for layer in dropped)
                         / plan.read_tokens / len(dropped))

    def passing(self, plan: StepPlan) -> float:
        """Share of the tokens that no dropped layer processes, with one draw for each set of tokens."""
        running = [plan.layers[layer] for layer in self.dropped if not plan.layers[layer].skipped]
        sets = {layer.token_set: layer.tokens for layer in running}
        return math.prod(1.0 - tokens / plan.read_tokens for tokens in sets.values())


def _works(config: RunConfig, dp: int) -> Iterator[Work]:
    total, found = total_steps(config, dp), policies(config)
    every = -(-total // DRAWN_STEPS)
    for steps, stretch in layer_tokens(config, dp).within(total):
        end = stretch.first_step + steps
        for first in range(stretch.first_step, end, every if found.is_drawn else steps):
            count = min(every, end - first) if found.is_drawn else steps
            yield Work(first, count, stretch.batch_samples, found.plan(first + count // 2))


def _with(config: RunConfig, consumed: Consumed, work: Work, steps: int) -> Consumed:
    """The counters after so many steps of a stretch."""
    return consumed.after_step(work.plan, samples=steps * work.batch_samples,
                               sample_flops=step_flops(config, work.plan),
                               full_sample_flops=whole_step_flops(config, work.plan))
