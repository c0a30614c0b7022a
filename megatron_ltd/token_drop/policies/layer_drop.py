"""LayerDrop (https://arxiv.org/abs/1909.11556, section 3.2): at each step every layer is skipped with the same
probability, for the whole global batch; evaluation uses all layers, and nothing is rescaled."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_ltd.token_drop.drawn_layers import DrawnLayers
from megatron_ltd.token_drop.lists import layer_list_problems, parse_layer_list
from megatron_ltd.token_drop.policy import BELOW_ONE, Range, Shape


@dataclass(frozen=True, kw_only=True)
class LayerDropSettings:
    """LayerDrop."""

    layer_drop_rate: float = 0.0
    """LayerDrop (https://arxiv.org/abs/1909.11556): at each step every layer is skipped with this probability, for the
    whole global batch. Evaluation uses all layers, and nothing is rescaled."""
    layer_drop_layers: str | None = None
    """Layers that LayerDrop may skip, written as for --random-ltd-layers. Default: all."""


@dataclass(frozen=True)
class LayerDrop(DrawnLayers):
    """Each of `listed` is skipped with probability `constant_rate`."""

    listed: tuple[int, ...]
    constant_rate: float

    name: ClassVar[str] = "layer-drop"
    Settings: ClassVar[type] = LayerDropSettings
    switch: ClassVar[str] = "layer_drop_rate"
    ranges: ClassVar[dict[str, Range]] = {"layer_drop_rate": BELOW_ONE}
    first_draw: ClassVar[int] = 0

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "LayerDrop":
        text = settings.layer_drop_layers
        listed = range(shape.layers) if text is None else parse_layer_list(text, "--layer-drop-layers")
        return cls(shape.layers, shape.seed, tuple(listed), settings.layer_drop_rate)

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        yield from layer_list_problems("--layer-drop-layers", settings.layer_drop_layers, shape.layers)

    def rate(self, layer: int, step: int) -> float:
        return self.constant_rate if layer in self.listed else 0.0

    def share(self, layer: int) -> float:
        return 1.0 - self.rate(layer, 0)
