"""What a run consumes as a function of the number of its steps: samples, and tokens summed over layers.

Batch size and kept length are constant over stretches of steps, so the sums are closed forms: exact integers, found by
bisection over the stretches, however many steps there are.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_ltd.batch_ramp import BatchRamp
from megatron_ltd.token_drop.schedule import KeptSchedule


class Stretch(NamedTuple):
    """Steps with one batch size and one kept length; the last stretch of a schedule never ends."""

    first_step: int
    batch_samples: int
    kept_tokens: int


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of a run, summed over layers; divided by the number of layers they are layer tokens.

    Args:
        ramp: the batch size over the run.
        kept: the kept length over the run.
        sequence_tokens: of a sample; what the other layers process.
        layers: of the model.
        dropped_layers: how many of them process the kept tokens only.
    """

    ramp: BatchRamp
    kept: KeptSchedule
    sequence_tokens: int
    layers: int
    dropped_layers: int

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """In order, from step 0 on."""
        sizes, step = {}, 0
        for steps, size in self.ramp.phases():
            sizes[step] = size
            step += steps
        sizes[step] = self.ramp.full_samples
        lengths = dict(self.kept.changes())
        found, size, length = [], 0, 0
        for first in sorted(sizes.keys() | lengths.keys()):
            size, length = sizes.get(first, size), lengths.get(first, length)
            found.append(Stretch(first, size, length))
        return tuple(found)

    @cached_property
    def _sums(self) -> tuple[int, ...]:
        """The sum over layers before each stretch."""
        sums = [0]
        for stretch, following in zip(self.stretches, self.stretches[1:], strict=False):
            sums.append(sums[-1] + (following.first_step - stretch.first_step) * self._of_step(stretch))
        return tuple(sums)

    def sum_after(self, steps: int) -> int:
        """Tokens that the first `steps` steps process, summed over layers."""
        index = bisect_right(self.stretches, steps, key=lambda stretch: stretch.first_step) - 1
        stretch = self.stretches[index]
        return self._sums[index] + (steps - stretch.first_step) * self._of_step(stretch)

    def steps_within(self, layer_tokens: int) -> int:
        """The largest number of steps that consume at most so many layer tokens."""
        budget = layer_tokens * self.layers
        index = bisect_right(self._sums, budget) - 1
        stretch = self.stretches[index]
        return stretch.first_step + (budget - self._sums[index]) // self._of_step(stretch)

    def within(self, steps: int) -> Iterator[tuple[int, Stretch]]:
        """(number of steps, stretch) of the first `steps` steps."""
        ends = [stretch.first_step for stretch in self.stretches[1:]] + [steps]
        for stretch, end in zip(self.stretches, ends, strict=True):
            if stretch.first_step < steps:
                yield min(end, steps) - stretch.first_step, stretch

    def _of_step(self, stretch: Stretch) -> int:
        kept = min(stretch.kept_tokens, self.sequence_tokens)
        return stretch.batch_samples * (self.sequence_tokens * (self.layers - self.dropped_layers)
                                        + kept * self.dropped_layers)
