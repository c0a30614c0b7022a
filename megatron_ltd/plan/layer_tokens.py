"""What a run consumes as a function of its number of steps: samples, raw tokens, and tokens summed over layers.

Batch size and plan are constant over stretches of steps, so the sums are closed forms: exact integers, found by
bisection over the stretches, however many steps there are.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.registry import Policies


class Stretch(NamedTuple):
    """Steps with one batch size and one plan; the last stretch of a schedule never ends."""

    first_step: int
    batch_samples: int
    plan: StepPlan


OfStep = Callable[[Stretch], int]


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of a run: tokens read, and tokens processed summed over layers; the latter divided by the number of layers
    are layer tokens.

    Args:
        ramp: the batch size over the run.
        policies: the plan over the run.
    """

    ramp: BatchRamp
    policies: Policies

    @property
    def layers(self) -> int:
        return self.policies.shape.layers

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """The stretches in order, from step 0 on."""
        sizes, step = {}, 0
        for steps, size in self.ramp.phases():
            sizes[step] = size
            step += steps
        sizes[step] = self.ramp.full_samples
        plans = dict(zip(self.policies.changes, self.policies.stretches, strict=True))
        found, size, plan = [], 0, plans[0]
        for first in sorted(sizes.keys() | plans.keys()):
            size, plan = sizes.get(first, size), plans.get(first, plan)
            found.append(Stretch(first, size, plan))
        return tuple(found)

    def sum_after(self, steps: int) -> int:
        """Tokens that the first `steps` steps process, summed over layers."""
        return self._after(steps, self._sums, _sum_of_step)

    def raw_after(self, steps: int) -> int:
        """Tokens that the first `steps` steps read."""
        return self._after(steps, self._raw_sums, _raw_of_step)

    def steps_within(self, layer_tokens: int) -> int:
        """The largest number of steps that consume at most this many layer tokens."""
        return self._within(layer_tokens * self.layers, self._sums, _sum_of_step)

    def steps_within_raw(self, tokens: int) -> int:
        """The largest number of steps that read at most this many tokens."""
        return self._within(tokens, self._raw_sums, _raw_of_step)

    def within(self, steps: int) -> Iterator[tuple[int, Stretch]]:
        """(number of steps, stretch) of the first `steps` steps."""
        ends = [stretch.first_step for stretch in self.stretches[1:]] + [steps]
        for stretch, end in zip(self.stretches, ends, strict=True):
            if stretch.first_step < steps:
                yield min(end, steps) - stretch.first_step, stretch

    @cached_property
    def _sums(self) -> tuple[int, ...]:
        return self._before_stretches(_sum_of_step)

    @cached_property
    def _raw_sums(self) -> tuple[int, ...]:
        return self._before_stretches(_raw_of_step)

    def _before_stretches(self, of_step: OfStep) -> tuple[int, ...]:
        """The sum before each stretch."""
        sums = [0]
        for stretch, following in zip(self.stretches, self.stretches[1:], strict=False):
            sums.append(sums[-1] + (following.first_step - stretch.first_step) * of_step(stretch))
        return tuple(sums)

    def _after(self, steps: int, sums: tuple[int, ...], of_step: OfStep) -> int:
        index = bisect_right(self.stretches, steps, key=lambda stretch: stretch.first_step) - 1
        stretch = self.stretches[index]
        return sums[index] + (steps - stretch.first_step) * of_step(stretch)

    def _within(self, budget: int, sums: tuple[int, ...], of_step: OfStep) -> int:
        index = bisect_right(sums, budget) - 1
        stretch = self.stretches[index]
        return stretch.first_step + (budget - sums[index]) // of_step(stretch)


def _sum_of_step(stretch: Stretch) -> int:
    return stretch.batch_samples * stretch.plan.layer_token_sum


def _raw_of_step(stretch: Stretch) -> int:
    return stretch.batch_samples * stretch.plan.text_tokens
