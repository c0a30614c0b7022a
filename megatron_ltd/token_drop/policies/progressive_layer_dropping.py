"""Progressive layer dropping (https://arxiv.org/abs/2010.13369, section 4): layers are skipped at random, at a rate
that rises with depth and over the run. The contribution of a layer is divided by the probability that it runs.

    theta(step) = (1 - theta) exp(-gamma x step) + theta
    rate(layer, step) = layer / layers x (1 - theta(step))

Layers are counted from 0 as in DeepSpeed's example, so the first always runs. The paper draws for every sublayer; here
a whole layer is skipped, for the whole global batch."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ltd.token_drop.drawn_layers import DrawnLayers
from megatron_ltd.token_drop.policy import Range, Shape


@dataclass(frozen=True, kw_only=True)
class ProgressiveLayerDroppingSettings:
    """Progressive layer dropping; the names are DeepSpeed's."""

    pld_theta: float = 1.0
    """Progressive layer dropping (https://arxiv.org/abs/2010.13369): at each step layer l of L, counted from 0, is
    skipped with probability l / L (1 - theta(t)); theta(t) falls from 1 to this value. The output of a layer that runs
    is divided by the probability that it runs. 1 skips nothing; the paper uses 0.5."""
    pld_gamma: float = 0.001
    """With --pld-theta: how fast theta(t) approaches it, as exp(-gamma t) in the step t. The paper uses 100 divided by
    the steps of the run."""


@dataclass(frozen=True)
class ProgressiveLayerDropping(DrawnLayers):
    """Skips and scales every layer but the first."""

    theta: float
    gamma: float

    name: ClassVar[str] = "progressive-layer-dropping"
    Settings: ClassVar[type] = ProgressiveLayerDroppingSettings
    switch: ClassVar[str] = "pld_theta"
    ranges: ClassVar[dict[str, Range]] = {"pld_theta": Range(0, 1), "pld_gamma": Range(0, low_open=True)}
    first_draw: ClassVar[int] = 3 << 16

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "ProgressiveLayerDropping":
        return cls(shape.layers, shape.seed, settings.pld_theta, settings.pld_gamma)

    def rate(self, layer: int, step: int) -> float:
        return layer / self.layers * (1.0 - self.theta) * (1.0 - math.exp(-self.gamma * step))

    def scale(self, rate: float) -> float:
        return 1.0 / (1.0 - rate)

    def share(self, layer: int) -> float:
        """At the end of a long run."""
        return 1.0 - layer / self.layers * (1.0 - self.theta)
