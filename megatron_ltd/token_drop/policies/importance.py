"""Token Dropping (https://arxiv.org/abs/2203.13240, section 3): all dropped layers keep the tokens whose vocabulary id
has the largest running loss; the first dropped layer attends to all tokens.

The tokens are chosen once a step, from the table of `importance_table.py`, before any layer runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_ltd.errors import ConfigError
from megatron_ltd.token_drop.kept_tokens import KeptTokens, KeptTokensSettings
from megatron_ltd.token_drop.plan import LayerPlan, TokenSet
from megatron_ltd.token_drop.policy import BELOW_ONE, Range, Shape

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = 3
"""[CLS] and two [SEP] of a BERT sample."""
FROM_TOKENS = TokenSet("importance", 0)
"""The set is chosen from the tokens themselves, so it comes with the samples and is not drawn in the stack."""


@dataclass(frozen=True, kw_only=True)
class ImportanceSettings(KeptTokensSettings):
    """How importance is learned."""

    token_drop_no_cross_layer: bool = False
    """With `importance`: the first dropped layer attends to kept tokens only, like the others, rather than to all."""
    token_drop_beta: float = 0.995
    """With `importance`: share of a vocabulary id's old importance that one step keeps."""
    token_drop_initial_importance: float = 10.0
    """With `importance`: initial importance of ids that have not been predicted yet."""
    token_drop_always_keep_ids: tuple[int, ...] | None = None
    """With `importance`: vocabulary ids that are kept before all others. Default: [UNK], [CLS], [SEP] and [MASK] of a
    BERT tokenizer."""
    token_drop_always_drop_ids: tuple[int, ...] | None = None
    """With `importance`: vocabulary ids that are dropped before all others. Default: [PAD]."""


@dataclass(frozen=True)
class Importance(KeptTokens):
    """One set for all dropped layers."""

    cross_layer: bool = True

    name: ClassVar[str] = "importance"
    Settings: ClassVar[type] = ImportanceSettings
    ranges: ClassVar[dict[str, Range]] = {"token_drop_beta": BELOW_ONE, "token_drop_initial_importance": Range(
        -1e4, 1e4, low_open=True, high_open=True)}

    @classmethod
    def default_layers(cls, shape: Shape) -> tuple[int, ...]:
        return tuple(range(max(1, shape.layers // 2 - 1), shape.layers - 1))

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "Importance":
        return cls(cls.layers_of(settings, shape), cls.lengths_of(settings, shape), shape.seed,
                   settings.random_ltd_strata, not settings.token_drop_no_cross_layer)

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        yield from super().check(settings, shape)
        try:
            dropped, lengths = cls.layers_of(settings, shape), cls.lengths_of(settings, shape)
        except ConfigError:
            return  # reported above
        if 0 in dropped:
            yield (f"--random-ltd-layers = {settings.random_ltd_layers}: the importance policy leaves the first layer "
                   "whole, since dropped tokens must have met their neighbours once; begin with layer 1")
        least = lengths.at(0)  # lengths never fall
        needed = None if shape.predictions is None else shape.predictions + SPECIAL_TOKENS
        if needed is not None and least < needed:
            yield (f"{least} kept tokens: fewer than the up to {shape.predictions} masked tokens (--mask-prob of "
                   f"--seq-length = {shape.tokens}) and {SPECIAL_TOKENS} special ones that are always kept; keep at "
                   f"least {needed}")
        keep, drop = settings.token_drop_always_keep_ids or (), settings.token_drop_always_drop_ids or ()
        if both := sorted(set(keep) & set(drop)):
            yield (f"--token-drop-always-keep-ids and --token-drop-always-drop-ids both name {both[0]}; it can be one "
                   "of the two")
        if shape.family == "vit":
            yield "--token-drop-policy = importance: patches have no vocabulary ids; use --random-ltd"

    def of_layer(self, layer: int, kept_tokens: int) -> LayerPlan:
        return LayerPlan(kept_tokens, FROM_TOKENS, attends_to_all=self.cross_layer and layer == self.dropped[0])


def given_sets(kept: "torch.Tensor | None") -> "dict[TokenSet, torch.Tensor]":
    """The set of this policy, if it comes with the samples. Shapes: [b, k]"""
    return {} if kept is None else {FROM_TOKENS: kept}
