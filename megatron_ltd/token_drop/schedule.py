"""How many tokens a dropped layer keeps: a pure function of the step.

MSLG, monotonic sequence length growth (random-LTD, https://arxiv.org/abs/2211.11586, section 3.3), is linear, R = 1; a
root degree R above 1 makes it grow faster at first:

    k(t) = floor(min + (max - min) (t / T)^(1/R)), rounded down to a multiple, never below min, and max from step T on

Without T the length is constant; a list of (step, length) is any other monotone schedule.
"""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class KeptLength:
    """The kept length over a run, growing or constant.

    Args:
        start_tokens: kept at step 0.
        full_tokens: the sequence length, reached after `steps`.
        steps: T; None keeps `start_tokens` for the whole run.
        multiple_tokens: the growing length is rounded down to a multiple of this.
        root_degree: R.
    """

    start_tokens: int
    full_tokens: int
    steps: int | None = None
    multiple_tokens: int = 1
    root_degree: int = 1

    def at(self, step: int) -> int:
        """Kept tokens of a sample at `step`, counted from 0."""
        if self.steps is None:
            return self.start_tokens
        if step >= self.steps:
            return self.full_tokens
        # Integer arithmetic: the length of a step must not depend on floating-point rounding. The floor of the root of
        # a fraction is the integer root of its floor.
        growth = self.full_tokens - self.start_tokens
        grown = self.start_tokens + integer_root(growth**self.root_degree * step // self.steps, self.root_degree)
        return max(self.start_tokens, grown - grown % self.multiple_tokens)

    def changes(self) -> tuple[tuple[int, int], ...]:
        """(first step, length) of each stretch of equal lengths, from step 0 on."""
        begins = {0: self.start_tokens}
        growth, unit = self.full_tokens - self.start_tokens, self.multiple_tokens
        if self.steps is None or growth <= 0:
            return tuple(begins.items())
        for length in range((self.start_tokens // unit + 1) * unit, self.full_tokens, unit):
            first = -(-(length - self.start_tokens)**self.root_degree * self.steps // growth**self.root_degree)
            if first >= self.steps:
                break
            begins[first] = length  # the last of several lengths reached in one step
        begins[self.steps] = self.full_tokens
        return tuple(begins.items())


@dataclass(frozen=True)
class ListedLength:
    """The kept length over a run as a list.

    Args:
        entries: (step, kept tokens from that step on), steps ascending from 0; after the last entry the length is
            constant.
    """

    entries: tuple[tuple[int, int], ...]

    def at(self, step: int) -> int:
        """Kept tokens of a sample at `step`, counted from 0."""
        return self.entries[bisect_right(self.entries, step, key=lambda entry: entry[0]) - 1][1]

    def changes(self) -> tuple[tuple[int, int], ...]:
        """(first step, length) of each stretch of equal lengths, from step 0 on."""
        previous = (0, *(length for _, length in self.entries))
        return tuple(entry for entry, before in zip(self.entries, previous, strict=False) if entry[1] != before)


KeptSchedule = KeptLength | ListedLength


def integer_root(value: int, degree: int) -> int:
    """The largest integer whose `degree`-th power is at most `value`, computed exactly."""
    if degree == 1 or value < 2:
        return value
    root = 1 << -(-value.bit_length() // degree)  # not below the root, from where Newton's steps only decrease
    while True:
        following = ((degree - 1) * root + value // root**(degree - 1)) // degree
        if following >= root:
            return root
        root = following
