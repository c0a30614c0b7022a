"""How many tokens a dropped layer keeps: a pure function of the step.

MSLG, monotonic sequence length growth (random-LTD, https://arxiv.org/abs/2211.11586, section 3.3):

    k(t) = floor(min + (max - min) t / T), rounded down to a multiple, never below min, and max from step T on
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class KeptLength:
    """The kept length over a run.

    Args:
        start_tokens: kept at step 0.
        full_tokens: the sequence length, reached after `steps`.
        steps: T; None keeps `start_tokens` for the whole run.
        multiple_tokens: the growing length is rounded down to a multiple of this.
    """

    start_tokens: int
    full_tokens: int
    steps: int | None = None
    multiple_tokens: int = 1

    def at(self, step: int) -> int:
        """Kept tokens of a sample at `step`, counted from 0."""
        if self.steps is None:
            return self.start_tokens
        if step >= self.steps:
            return self.full_tokens
        # Integer arithmetic: the length of a step must not depend on floating-point rounding.
        grown = self.start_tokens + (self.full_tokens - self.start_tokens) * step // self.steps
        return max(self.start_tokens, grown - grown % self.multiple_tokens)
