"""What one step computes, layer by layer: plain values, the same on every process."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple


class TokenSet(NamedTuple):
    """A set of kept tokens: the policy that draws it and the number of the draw. Layers with equal sets keep the same
    tokens."""

    policy: str
    number: int


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does with a sample.

    Args:
        tokens: number of tokens it processes, unless it is skipped.
        token_set: which tokens it processes; None: all that are read.
        attends_to_all: keys and values come from all tokens that are read, not just from its own.
        skipped: the layer is the identity in this step.
        scale: factor on the layer's update to the residual stream.
        backward: False: the layer's update is a constant in the backward pass, and its weights get no gradient.
    """

    tokens: int
    token_set: TokenSet | None = None
    attends_to_all: bool = False
    skipped: bool = False
    scale: float = 1.0
    backward: bool = True

    @property
    def processed_tokens(self) -> int:
        return 0 if self.skipped else self.tokens

    @property
    def learns(self) -> bool:
        """Whether the layer's weights get a gradient."""
        return self.backward and not self.skipped


@dataclass(frozen=True)
class StepPlan:
    """How many tokens are read of each sample, and what each layer does with them.

    Args:
        read_tokens: tokens that are read from the start of a sample; all of them without a sequence curriculum. With
            token superposition these are bags.
        layers: by global layer number.
        fold: tokens of text in each of them.
    """

    read_tokens: int
    layers: tuple[LayerPlan, ...]
    fold: int = 1

    @classmethod
    def whole(cls, tokens: int, layers: int, fold: int = 1) -> "StepPlan":
        """Every token in every layer."""
        return cls(tokens, (LayerPlan(tokens),) * layers, fold)

    def with_layers(self, changes: Iterable[tuple[int, LayerPlan]]) -> "StepPlan":
        """The plan with the given plans for some layers."""
        layers = list(self.layers)
        for layer, plan in changes:
            layers[layer] = plan
        return replace(self, layers=tuple(layers))

    @property
    def text_tokens(self) -> int:
        """Tokens of text that are read of a sample."""
        return self.read_tokens * self.fold

    @cached_property
    def is_whole(self) -> bool:
        """Whether every layer processes all tokens that are read, forward and backward."""
        return all(layer.processed_tokens == self.read_tokens and layer.backward for layer in self.layers)

    @cached_property
    def kept_tokens(self) -> int:
        """The smallest number of tokens that any layer processes, ignoring skips."""
        return min((layer.tokens for layer in self.layers), default=self.read_tokens)

    @cached_property
    def skipped_layers(self) -> tuple[int, ...]:
        return tuple(number for number, layer in enumerate(self.layers) if layer.skipped)

    @cached_property
    def layer_token_sum(self) -> int:
        """Tokens of a sample that the layers process, summed over layers."""
        return sum(layer.processed_tokens for layer in self.layers)
