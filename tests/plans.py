"""Plans of a step, made by hand."""

from collections.abc import Collection
from dataclasses import replace

from megatron_ltd.token_drop.plan import LayerPlan, StepPlan, TokenSet


def plan_of(read: int, layers: int, kept: int | None = None, dropped: Collection[int] = (), *,
            skipped: Collection[int] = (), shared: bool = False, attends_to_all: int | None = None) -> StepPlan:
    """Dropped layers keep so many tokens: each a set of its own, or all the one that comes with the samples."""
    plan = StepPlan.whole(read, layers)
    if kept is not None and kept < read:
        plan = plan.with_layers((layer, LayerPlan(
            kept, TokenSet("importance", 0) if shared else TokenSet("random", layer),
            attends_to_all=layer == attends_to_all)) for layer in dropped)
    return plan.with_layers((layer, replace(plan.layers[layer], skipped=True)) for layer in skipped)
