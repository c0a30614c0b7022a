"""RAPTR, progressive subnetwork training (https://arxiv.org/abs/2402.05913, section 3): every step trains a random path
through some of the layers, always with the first and the last; the path grows in stages to the full model.

The paper draws each layer by itself and gives the mean length of a stage; here every step of a stage runs exactly so
many layers, so that its cost is known. The paper scales the layers that run, too: here by one over the square root of
the share of the middle layers that run, which preserves the variance of the residual stream while updates are
uncorrelated; its own factor may differ."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ltd.errors import ConfigError
from megatron_ltd.token_drop.drawn_layers import DrawnLayers
from megatron_ltd.token_drop.lists import parse_length_list
from megatron_ltd.token_drop.policy import Shape
from megatron_ltd.token_drop.schedule import ListedLength

FLAG = "--raptr-stages"


@dataclass(frozen=True, kw_only=True)
class RaptrSettings:
    """RAPTR."""

    raptr_stages: str | None = None
    """RAPTR (https://arxiv.org/abs/2402.05913): number of layers that run, as a list of STEP:LAYERS such as
    `0:6,10000:8,20000:10,30000:12`. The first and the last always run; each step draws the others."""


@dataclass(frozen=True)
class Raptr(DrawnLayers):
    """Skips and scales some of the layers between the first and the last."""

    stages: ListedLength

    name: ClassVar[str] = "raptr"
    Settings: ClassVar[type] = RaptrSettings
    switch: ClassVar[str] = "raptr_stages"
    first_draw: ClassVar[int] = 4 << 16

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "Raptr":
        return cls(shape.layers, shape.seed, ListedLength(parse_length_list(settings.raptr_stages, FLAG)))

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        try:
            lengths = [length for _, length in parse_length_list(settings.raptr_stages, FLAG)]
        except ConfigError as error:
            yield str(error)
            return
        if wrong := [str(length) for length in lengths if not 2 <= length <= shape.layers]:
            yield (f"{cls.asked_for(settings)}: a stage runs from 2 to --num-layers = {shape.layers} layers, not "
                   f"{', '.join(wrong)}; choose such numbers")

    def rate(self, layer: int, step: int) -> float:
        if layer in (0, self.layers - 1):
            return 0.0
        return (self.layers - self.stages.at(step)) / (self.layers - 2)

    def drawn(self, step: int) -> Collection[int]:
        """As many as the stage skips: those with the smallest draws."""
        middle = sorted(range(1, self.layers - 1), key=lambda layer: self.number(layer, step))
        return middle[:self.layers - self.stages.at(step)]

    def scale(self, rate: float) -> float:
        return 1.0 / math.sqrt(1.0 - rate)

    def share(self, layer: int) -> float:
        """Averaged over the stages, since the length of the last is not known here."""
        rates = [self.rate(layer, step) for step, _ in self.stages.entries]
        return 1.0 - sum(rates) / len(rates)
