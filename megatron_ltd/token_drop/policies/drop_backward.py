"""DropBP (https://arxiv.org/abs/2402.17812, section 3): the forward pass runs every layer, the backward pass skips some
of them; gradients bypass those on the residual stream.

The paper fits a rate to each layer's sensitivity; here one rate holds for all layers but the last, so that the loss and
the first gradients are those of the full model. A layer without a backward pass keeps nothing of its forward pass in
memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megatron_ltd.token_drop.drawn_layers import DrawnLayers
from megatron_ltd.token_drop.plan import LayerPlan, StepPlan
from megatron_ltd.token_drop.policy import BELOW_ONE, Range, Shape


@dataclass(frozen=True, kw_only=True)
class DropBackwardSettings:
    """Backward passes through some layers only."""

    drop_backward_rate: float = 0.0
    """DropBP (https://arxiv.org/abs/2402.17812): at each step the backward pass skips every layer but the last with
    this probability, for the whole global batch."""


@dataclass(frozen=True)
class DropBackward(DrawnLayers):
    """Each layer but the last has no backward pass with probability `constant_rate`."""

    constant_rate: float

    name: ClassVar[str] = "drop-backward"
    Settings: ClassVar[type] = DropBackwardSettings
    switch: ClassVar[str] = "drop_backward_rate"
    ranges: ClassVar[dict[str, Range]] = {"drop_backward_rate": BELOW_ONE}
    skips_layers: ClassVar[bool] = False
    first_draw: ClassVar[int] = 2 << 16

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "DropBackward":
        return cls(shape.layers, shape.seed, settings.drop_backward_rate)

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        if shape.layers < 2:
            yield (f"{cls.asked_for(settings)}: the last layer always has a backward pass, and --num-layers = "
                   f"{shape.layers}; leave it out")

    def rate(self, layer: int, step: int) -> float:
        return self.constant_rate if layer < self.layers - 1 else 0.0

    def of_drawn(self, layer: LayerPlan) -> LayerPlan:
        return replace(layer, backward=False)

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        return {"layers_without_backward": [number for number, layer in enumerate(plan.layers) if not layer.backward]}
