"""TREAD (https://arxiv.org/abs/2501.04765, section 3): a uniform random set of each sample's tokens passes through the
dropped layers; the others bypass all of them and rejoin after the last.

The paper routes tokens of diffusion transformers; here layers, kept length and its schedule are settings, and a new set
may be drawn every few layers, so that each token is processed by some of them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ltd.token_drop.kept_tokens import KeptTokensSettings
from megatron_ltd.token_drop.plan import LayerPlan, TokenSet
from megatron_ltd.token_drop.policies.random_ltd import RandomTokens
from megatron_ltd.token_drop.policy import ONE_OR_MORE, Range, Shape


@dataclass(frozen=True, kw_only=True)
class TreadSettings(KeptTokensSettings):
    """How many layers share a set of tokens."""

    tread_set_layers: int | None = None
    """With --token-drop-policy tread: number of dropped layers after which a new set of tokens is drawn. Default: one
    set for all of them."""


@dataclass(frozen=True)
class Tread(RandomTokens):
    """One set for every `set_layers` dropped layers, numbered by the first of them."""

    set_layers: int = 0

    name: ClassVar[str] = "tread"
    Settings: ClassVar[type] = TreadSettings
    ranges: ClassVar[dict[str, Range]] = {"tread_set_layers": ONE_OR_MORE}

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "Tread":
        layers = cls.layers_of(settings, shape)
        return cls(layers, cls.lengths_of(settings, shape), shape.seed, settings.random_ltd_strata,
                   settings.tread_set_layers or len(layers))

    def of_layer(self, layer: int, kept_tokens: int) -> LayerPlan:
        place = self.dropped.index(layer)
        return LayerPlan(kept_tokens, TokenSet(self.name, self.dropped[place - place % self.set_layers]))
