"""Layers drawn at every step: the common part of the policies that skip layers, or their backward passes, at random.

A layer is drawn for the whole global batch. Collectives therefore match on all ranks, and a skipped layer saves time on
every layout.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megatron_ltd.token_drop.draws import uniform
from megatron_ltd.token_drop.plan import LayerPlan, StepPlan
from megatron_ltd.token_drop.policy import Policy


@dataclass(frozen=True)
class DrawnLayers(Policy):
    """Every step skips the layers that it draws; the updates of the others may be scaled.

    Args:
        layers: number of layers in the model.
    """

    layers: int
    seed: int

    is_drawn: ClassVar[bool] = True
    skips_layers: ClassVar[bool] = True
    first_draw: ClassVar[int]
    """Added to the layer in the hash: a multiple of 2^16 of its own, so that no two policies draw the same numbers."""

    def rate(self, layer: int, step: int) -> float:
        """Probability that the step draws the layer."""
        raise NotImplementedError

    def number(self, layer: int, step: int) -> float:
        """The draw of a layer, uniform in [0, 1)."""
        return uniform(self.seed, step, layer + self.first_draw)

    def drawn(self, step: int) -> Collection[int]:
        """The layers that the step draws, independently of each other."""
        return {layer for layer in range(self.layers) if self.number(layer, step) < self.rate(layer, step)}

    def of_drawn(self, layer: LayerPlan) -> LayerPlan:
        """What becomes of a drawn layer."""
        return replace(layer, skipped=True)

    def scale(self, rate: float) -> float:
        """Factor on the update of a layer that was not drawn."""
        return 1.0

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        drawn = self.drawn(step)
        return plan.with_layers(
            (number, self.of_drawn(layer) if number in drawn else
             replace(layer, scale=layer.scale * self.scale(self.rate(number, step))))
            for number, layer in enumerate(plan.layers))

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        return {"skipped_layers": list(plan.skipped_layers)}
