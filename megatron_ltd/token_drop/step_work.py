"""What one step computes: a pure function of the settings and the step, the same on every process."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class StepWork:
    """What is read of each sample, and what of it the layers process.

    Args:
        sequence_tokens: first tokens of a sample that are read; all of them without a sequence curriculum.
        kept_tokens: of these, what a dropped layer keeps.
        skipped_layers: global ids of the layers that LayerDrop skips: they are the identity.
    """

    sequence_tokens: int
    kept_tokens: int
    skipped_layers: frozenset[int] = frozenset()

    @classmethod
    def whole(cls, sequence_tokens: int) -> "StepWork":
        """Every token in every layer."""
        return cls(sequence_tokens, sequence_tokens)

    @property
    def is_whole(self) -> bool:
        """Whether every layer processes all that is read."""
        return self.kept_tokens >= self.sequence_tokens and not self.skipped_layers

    def tokens_of(self, layer: int, dropped_layers: Collection[int]) -> int:
        """Tokens of a sample that a layer processes."""
        if layer in self.skipped_layers:
            return 0
        return min(self.kept_tokens, self.sequence_tokens) if layer in dropped_layers else self.sequence_tokens

    def layer_token_sum(self, layers: int, dropped_layers: Collection[int]) -> int:
        """Tokens of a sample that the layers process, summed over layers."""
        return sum(self.tokens_of(layer, dropped_layers) for layer in range(layers))
