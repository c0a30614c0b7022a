"""DropBP (https://arxiv.org/abs/2402.17812, section 3): the forward pass runs every layer, the backward pass skips some
of them; gradients bypass those on the residual stream.

The paper fits a rate to each layer's sensitivity; here one rate holds for all layers but the last, so that the loss and
the first gradients are those of the full model. A layer without a backward pass keeps nothing of its forward pass in
memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megatron_ltd.token_drop.draws import uniform
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policy import BELOW_ONE, Policy, Range, Shape

DROP_BACKWARD_DRAWS = 1 << 17
"""Added to the layer, so that draws differ from those of the policies that skip layers."""


@dataclass(frozen=True, kw_only=True)
class DropBackwardSettings:
    """Backward passes through some layers only."""

    drop_backward_rate: float = 0.0
    """DropBP (https://arxiv.org/abs/2402.17812): at each step the backward pass skips every layer but the last with
    this probability, for the whole global batch."""


@dataclass(frozen=True)
class DropBackward(Policy):
    """Each layer but the last has no backward pass with probability `rate`."""

    rate: float
    layers: int
    seed: int

    name: ClassVar[str] = "drop-backward"
    Settings: ClassVar[type] = DropBackwardSettings
    ranges: ClassVar[dict[str, Range]] = {"drop_backward_rate": BELOW_ONE}
    is_drawn: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "DropBackward | None":
        rate = settings.drop_backward_rate
        return None if rate == 0.0 else cls(rate, shape.layers, shape.seed)

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        if settings.drop_backward_rate > 0.0 and shape.layers < 2:
            yield (f"--drop-backward-rate = {settings.drop_backward_rate}: the last layer always has a backward pass, "
                   f"and --num-layers = {shape.layers}; leave it out")

    @property
    def asked_for(self) -> str:
        return f"--drop-backward-rate = {self.rate}"

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        return plan.with_layers((layer, replace(plan.layers[layer], backward=False))
                                for layer in range(self.layers - 1)
                                if uniform(self.seed, step, layer + DROP_BACKWARD_DRAWS) < self.rate)

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        return {"layers_without_backward": [number for number, layer in enumerate(plan.layers) if not layer.backward]}
