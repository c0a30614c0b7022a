"""Layer dropout with a schedule (https://arxiv.org/abs/2609.05275): layers are skipped at random, at a rate that rises
with depth and falls to zero over the run; in the last part of the run the full model recovers. The contribution of a
layer is divided by the probability that it runs.

    rate(layer, step) = peak x layer / (layers - 1) x max(0, 1 - step / steps)

A layer is skipped for the whole global batch, which saves time on every layout. Both profiles are linear here; the
paper's own, and its rule for the learning rate, may differ."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megatron_ltd.token_drop.draws import uniform
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policy import BELOW_ONE, ONE_OR_MORE, Policy, Range, Shape

LAYER_DROPOUT_DRAWS = 1 << 16
"""Added to the layer, so that draws differ from LayerDrop's."""


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
class LayerDropout(Policy):
    """Skips and scales every layer but the first."""

    peak: float
    steps: int
    layers: int
    seed: int

    name: ClassVar[str] = "layer-dropout"
    Settings: ClassVar[type] = LayerDropoutSettings
    ranges: ClassVar[dict[str, Range]] = {"layer_dropout_rate": BELOW_ONE, "layer_dropout_steps": ONE_OR_MORE}
    is_drawn: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "LayerDropout | None":
        if settings.layer_dropout_rate == 0.0:
            return None
        return cls(settings.layer_dropout_rate, settings.layer_dropout_steps or 1, shape.layers, shape.seed)

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        rate = settings.layer_dropout_rate
        if rate > 0.0 and settings.layer_dropout_steps is None:
            yield (f"--layer-dropout-rate = {rate} is given without --layer-dropout-steps: the rate falls to 0 over a "
                   "number of steps; give it, for example three quarters of the run")
        if rate > 0.0 and settings.layer_drop_rate > 0.0:
            yield (f"--layer-dropout-rate = {rate} is given with --layer-drop-rate = {settings.layer_drop_rate}: both "
                   "skip layers; keep one of them")

    @classmethod
    def idle(cls, settings: Any) -> Iterator[str]:
        if settings.layer_dropout_rate == 0.0 and settings.layer_dropout_steps is not None:
            yield "--layer-dropout-steps has no effect without --layer-dropout-rate: no layer is skipped"

    @property
    def asked_for(self) -> str:
        return f"--layer-dropout-rate = {self.peak}"

    def rate(self, layer: int, step: int) -> float:
        """Probability that the step skips the layer."""
        return self.peak * layer / max(1, self.layers - 1) * max(0.0, 1.0 - step / self.steps)

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        changes = []
        for number, layer in enumerate(plan.layers):
            rate = self.rate(number, step)
            if rate > 0.0:
                skipped = uniform(self.seed, step, number + LAYER_DROPOUT_DRAWS) < rate
                changes.append((number, replace(layer, skipped=layer.skipped or skipped,
                                                scale=layer.scale / (1.0 - rate))))
        return plan.with_layers(changes)

    def share(self, layer: int) -> float:
        """Averaged over the steps in which layers are skipped, since the length of the run is not known here."""
        return 1.0 - self.rate(layer, 0) / 2.0

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        return {"skipped_layers": list(plan.skipped_layers)}
