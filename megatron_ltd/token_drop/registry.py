"""The list of policies, and the combined policies of a run.

They are composed in this order: first how many tokens are read, then how many of them make a bag, then which a layer
keeps, then which layers are skipped. Skipping overrides choosing, and scales multiply.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_ltd.token_drop.kept_tokens import KeptTokens
from megatron_ltd.token_drop.plan import StepPlan, TokenSet
from megatron_ltd.token_drop.policies.alternate import Alternate
from megatron_ltd.token_drop.policies.drop_backward import DropBackward
from megatron_ltd.token_drop.policies.importance import Importance
from megatron_ltd.token_drop.policies.layer_drop import LayerDrop
from megatron_ltd.token_drop.policies.layer_dropout import LayerDropout
from megatron_ltd.token_drop.policies.progressive_layer_dropping import ProgressiveLayerDropping
from megatron_ltd.token_drop.policies.random_ltd import RandomLTD
from megatron_ltd.token_drop.policies.raptr import Raptr
from megatron_ltd.token_drop.policies.sequence_curriculum import SequenceCurriculum
from megatron_ltd.token_drop.policies.superposition import Superposition
from megatron_ltd.token_drop.policies.tread import Tread
from megatron_ltd.token_drop.policy import Policy, Shape

if TYPE_CHECKING:
    import torch

POLICIES: tuple[type[Policy], ...] = (
    SequenceCurriculum,
    Superposition,
    RandomLTD,
    Importance,
    Tread,
    Alternate,
    LayerDrop,
    LayerDropout,
    ProgressiveLayerDropping,
    Raptr,
    DropBackward,
)


@dataclass(frozen=True)
class Policies:
    """The policies of a run."""

    shape: Shape
    active: tuple[Policy, ...]

    @classmethod
    def of(cls, settings: Any, shape: Shape, of_model: tuple[Policy, ...] = ()) -> "Policies":
        """The policies that the settings enable.

        Args:
            of_model: those that belong to the model; they come last.

        Raises:
            ConfigError: settings that cannot be parsed.
        """
        return cls(shape, (*(kind.of(settings, shape) for kind in POLICIES if kind.is_on(settings)), *of_model))

    def plan(self, step: int) -> StepPlan:
        """What a step computes, counted from 0."""
        return self._plan(step, self.active)

    def planned(self, step: int) -> StepPlan:
        """The plan of a step without its random draws: layers that may be skipped count as not skipped."""
        return self._plan(step, tuple(policy for policy in self.active if not policy.is_drawn))

    @property
    def whole(self) -> StepPlan:
        """Whole samples, in every layer."""
        return StepPlan.whole(self.shape.tokens, self.shape.layers)

    def keeping(self, kept_tokens: int) -> StepPlan:
        """The plan for whole samples of which dropped layers keep this many tokens, whatever the step."""
        (chooser,) = (policy for policy in self.active if isinstance(policy, KeptTokens))
        return chooser.keeping(self.whole, kept_tokens)

    @property
    def is_drawn(self) -> bool:
        return any(policy.is_drawn for policy in self.active)

    @cached_property
    def changes(self) -> tuple[int, ...]:
        """First steps of the stretches over which `planned` is constant, from 0 on."""
        return tuple(sorted({0, *(step for policy in self.active for step in policy.changes())}))

    @cached_property
    def stretches(self) -> tuple[StepPlan, ...]:
        """The plan of each stretch."""
        return tuple(self.planned(step) for step in self.changes)

    def lengths(self) -> set[int]:
        """All numbers of tokens that layers process over the run."""
        return {layer.tokens for plan in self.stretches for layer in plan.layers}

    def share(self, layer: int) -> float:
        """Expected share of the steps in which a layer is not skipped."""
        share = 1.0
        for policy in self.active:
            share *= policy.share(layer)
        return share

    def may_skip(self, layer: int) -> bool:
        """Whether a step may skip the layer, by a draw or by its schedule."""
        return self.share(layer) < 1.0 or any(plan.layers[layer].skipped for plan in self.stretches)

    def named(self, name: str) -> Policy | None:
        """The active policy with this name."""
        return next((policy for policy in self.active if policy.name == name), None)

    def token_sets(self, plan: StepPlan, layers: Collection[int], sample_ids: "torch.Tensor",
                   given: Mapping[TokenSet, "torch.Tensor"]) -> dict[TokenSet, "torch.Tensor"]:
        """The kept positions that some layers need. Each set is drawn once, all sets of a policy together.

        Args:
            layers: global layer numbers.
            given: sets that come with the samples.

        Shapes:
            sample_ids [b] int64 -> [b, k] int64 of each set, ascending
        """
        found, wanted = dict(given), dict[tuple[str, int], list[int]]()
        for layer in layers:
            plan_of = plan.layers[layer]
            if plan_of.token_set is not None and plan_of.token_set not in found and not plan_of.skipped:
                numbers = wanted.setdefault((plan_of.token_set.policy, plan_of.tokens), [])
                if plan_of.token_set.number not in numbers:
                    numbers.append(plan_of.token_set.number)
        for (name, kept_tokens), numbers in wanted.items():
            policy = self.named(name)
            assert policy is not None, name
            rows = policy.rows(numbers, sample_ids, plan.read_tokens, kept_tokens)
            found |= {TokenSet(name, number): rows[place] for place, number in enumerate(numbers)}
        return found

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        """The policies' fields in a step's line of the metrics file."""
        return {name: value for policy in self.active for name, value in policy.log_fields(plan).items()}

    def _plan(self, step: int, policies: tuple[Policy, ...]) -> StepPlan:
        plan = self.whole
        for policy in policies:
            plan = policy.plan(step, plan)
        return plan


def policy_problems(settings: Any, shape: Shape) -> Iterator[str]:
    """Problems with the settings of all policies."""
    for kind in POLICIES:
        if kind.is_on(settings):
            yield from kind.check(settings, shape)


def idle_policy_settings(settings: Any) -> Iterator[str]:
    """Policy settings that are given but have no effect."""
    for kind in POLICIES:
        yield from kind.idle(settings)
