"""LayerDrop (https://arxiv.org/abs/1909.11556, section 3.2): at each step every layer is skipped with the same
probability, for the whole global batch; evaluation uses all layers, and nothing is rescaled."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megatron_ltd.token_drop.draws import uniform
from megatron_ltd.token_drop.lists import layer_list_problems, parse_layer_list
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policy import BELOW_ONE, Policy, Range, Shape


@dataclass(frozen=True, kw_only=True)
class LayerDropSettings:
    """LayerDrop."""

    layer_drop_rate: float = 0.0
    """LayerDrop (https://arxiv.org/abs/1909.11556): at each step every layer is skipped with this probability, for the
    whole global batch. Evaluation uses all layers, and nothing is rescaled."""
    layer_drop_layers: str | None = None
    """Layers that LayerDrop may skip, written as for --random-ltd-layers. Default: all."""


@dataclass(frozen=True)
class LayerDrop(Policy):
    """Each of `layers` is skipped with probability `rate`, independently of the others and of other steps."""

    layers: tuple[int, ...]
    rate: float
    seed: int

    name: ClassVar[str] = "layer-drop"
    Settings: ClassVar[type] = LayerDropSettings
    ranges: ClassVar[dict[str, Range]] = {"layer_drop_rate": BELOW_ONE}
    is_drawn: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "LayerDrop | None":
        if settings.layer_drop_rate == 0.0:
            return None
        listed = settings.layer_drop_layers
        layers = range(shape.layers) if listed is None else sorted(parse_layer_list(listed, "--layer-drop-layers"))
        return cls(tuple(layers), settings.layer_drop_rate, shape.seed)

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        yield from layer_list_problems("--layer-drop-layers", settings.layer_drop_layers, shape.layers)

    @classmethod
    def idle(cls, settings: Any) -> Iterator[str]:
        if settings.layer_drop_rate == 0.0 and settings.layer_drop_layers is not None:
            yield "--layer-drop-layers has no effect without --layer-drop-rate: no layer is skipped"

    @property
    def asked_for(self) -> str:
        return f"--layer-drop-rate = {self.rate}"

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        return plan.with_layers((layer, replace(plan.layers[layer], skipped=True)) for layer in self.layers
                                if uniform(self.seed, step, layer) < self.rate)

    def share(self, layer: int) -> float:
        return 1.0 - self.rate if layer in self.layers else 1.0

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        return {"skipped_layers": list(plan.skipped_layers)}
