"""Layer dropout with a schedule (https://arxiv.org/abs/2609.05275): layers are skipped at random, at a rate that rises
with depth and falls to zero over the run; in the last part of the run the full model recovers. The contribution of a
layer is divided by the probability that it runs.

    rate(layer, step) = peak x layer / (layers - 1) x max(0, 1 - step / steps)

Both profiles are linear here; the paper's own, and its rule for the learning rate, may differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ltd.token_drop.drawn_layers import DrawnLayers
from megatron_ltd.token_drop.policy import BELOW_ONE, ONE_OR_MORE, Range, Shape


@dataclass(frozen=True, kw_only=True)
class LayerDropoutSettings:
    """Layer dropout with a schedule."""

    layer_dropout_rate: float = 0.0
    """Layer dropout (https://arxiv.org/abs/2609.05275): probability that the last layer is skipped at the first step.
    It falls linearly to 0 towards the first layer, and over --layer-dropout-steps; the output of a layer that runs is
    divided by the probability that it runs."""
    layer_dropout_steps: int | None = None
    """Steps over which the layer dropout rate falls linearly to 0; the rest of the run uses every layer."""


@dataclass(frozen=True)
class LayerDropout(DrawnLayers):
    """Skips and scales every layer but the first."""

    peak: float
    steps: int

    name: ClassVar[str] = "layer-dropout"
    Settings: ClassVar[type] = LayerDropoutSettings
    switch: ClassVar[str] = "layer_dropout_rate"
    ranges: ClassVar[dict[str, Range]] = {"layer_dropout_rate": BELOW_ONE, "layer_dropout_steps": ONE_OR_MORE}
    first_draw: ClassVar[int] = 1 << 16

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "LayerDropout":
        return cls(shape.layers, shape.seed, settings.layer_dropout_rate, settings.layer_dropout_steps or 1)

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        if settings.layer_dropout_steps is None:
            yield (f"{cls.asked_for(settings)} is given without --layer-dropout-steps: the rate falls to 0 over a "
                   "number of steps; give it, for example three quarters of the run")

    def rate(self, layer: int, step: int) -> float:
        return self.peak * layer / max(1, self.layers - 1) * max(0.0, 1.0 - step / self.steps)

    def scale(self, rate: float) -> float:
        return 1.0 / (1.0 - rate)

    def share(self, layer: int) -> float:
        """Averaged over the steps in which layers are skipped, since the length of the run is not known here."""
        return 1.0 - self.rate(layer, 0) / 2.0
