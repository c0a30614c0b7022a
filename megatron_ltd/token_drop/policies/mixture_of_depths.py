"""Mixture-of-Depths (https://arxiv.org/abs/2404.02258, section 3): every N-th layer processes a fixed share of the
tokens of each sample, chosen by a router with weights of its own.

    kept       the k tokens of a sample with the largest router scores (in each stratum, if there are several)
    stream[kept] += score[kept] block(stream[kept])          the score on the path is how the router learns
    predictor  learns whether a token is among the k; in evaluation it decides instead, from that token alone

Which tokens these are follows from activations, so the model chooses them (`model/router.py`), and the routers belong
to the model's settings rather than to a policy's. This policy says how many tokens they are.

Differences to the paper: its predictor is a small MLP, here it is linear, like the router; strata.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megatron_ltd.token_drop.plan import StepPlan, TokenSet
from megatron_ltd.token_drop.policy import Policy


@dataclass(frozen=True)
class MixtureOfDepths(Policy):
    """How many tokens the routed layers process in training.

    Args:
        layers: those with a router.
        capacity: share of the tokens read.
        strata: equal spans of the sequence that keep equally many.
    """

    layers: tuple[int, ...]
    capacity: float
    strata: int = 1

    name: ClassVar[str] = "mixture-of-depths"
    chooses_tokens: ClassVar[bool] = True

    def asked_for(self, settings: Any) -> str:  # type: ignore[override]  # a setting of the model
        return f"--mixture-of-depths-capacity = {self.capacity}"

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        kept = max(1, round(self.capacity * plan.read_tokens) // self.strata) * self.strata
        return plan.with_layers((layer, replace(plan.layers[layer], tokens=kept, token_set=TokenSet(self.name, layer)))
                                for layer in self.layers)
