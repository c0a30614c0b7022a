"""Token superposition: early in the run the layers process bags of K consecutive tokens, each of which predicts the
next.

    input of bag j     mean of the embeddings of tokens [j K, (j + 1) K), at position j
    targets of bag j   tokens [(j + 1) K, (j + 2) K), all from one output; the last bag has one, the sample's last label
    loss               mean of the cross-entropies of all unmasked targets

After the given steps the run trains on single tokens. In both papers the texts of the two phases are disjoint.

    same   a sample is read as seq_length / K bags, at about a K-th of the FLOPs. Patch-level training
           (https://arxiv.org/abs/2407.12665, section 2) also keeps the text of a step, but as a K-th of the samples,
           each K times as long, and trains its phases as two runs, each with its own optimizer state and schedule.
    more   a sample is K seq_length consecutive tokens, read as seq_length bags, at the FLOPs of a normal step: token
           superposition (https://arxiv.org/abs/2605.06546). `data/gpt/parts.py` says which samples these are.

In neither paper does the last bag of a sample have a target. Here one run has one optimizer state and one learning rate
schedule. Kept tokens of the other policies, strata and the lengths of a sequence curriculum with `same` count bags.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policy import ONE_OR_MORE, Policy, Range, Shape

UNFIT = {"bert": "BERT predicts masked tokens, not the next ones", "vit": "an image has no next tokens"}


@dataclass(frozen=True, kw_only=True)
class SuperpositionSettings:
    """Bags of tokens first."""

    token_superposition: int | None = None
    """K: for the first --token-superposition-steps steps, the mean of K consecutive token embeddings goes through the
    layers, and the next K tokens are predicted at once. For GPT. Evaluation reads single tokens."""
    token_superposition_steps: int | None = None
    """Steps with --token-superposition, from the start of the run."""
    token_superposition_text: Literal["same", "more"] = "same"
    """What a step reads with --token-superposition. `same`: the same text, as --seq-length / K bags of each sample.
    `more`: K times as much, as samples of K x --seq-length tokens."""


@dataclass(frozen=True)
class Superposition(Policy):
    """How many tokens make one position of the residual stream.

    Args:
        more: read K times as much text, rather than process a K-th of the positions.
    """

    size: int
    steps: int
    more: bool

    name: ClassVar[str] = "superposition"
    Settings: ClassVar[type] = SuperpositionSettings
    switch: ClassVar[str] = "token_superposition"
    ranges: ClassVar[dict[str, Range]] = {"token_superposition": Range(2), "token_superposition_steps": ONE_OR_MORE}

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "Superposition":
        return cls(settings.token_superposition, settings.token_superposition_steps or 0,
                   settings.token_superposition_text == "more")

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        size, text = settings.token_superposition, cls.asked_for(settings)
        if settings.token_superposition_steps is None:
            yield f"{text} is given without --token-superposition-steps, after which bags end; give both"
        if shape.family in UNFIT:
            yield f"{text}: {UNFIT[shape.family]}; leave it out"
        if settings.policy == "importance":
            yield (f"{text} is given with --token-drop-policy = importance, and a bag has no vocabulary id whose loss "
                   "could be recorded; keep one of them")
        if settings.token_superposition_text == "same":
            yield from _uneven(text, size, settings, shape)

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        if step >= self.steps:
            return plan
        positions = plan.read_tokens if self.more else plan.read_tokens // self.size
        return StepPlan.whole(positions, len(plan.layers), fold=self.size)

    def changes(self) -> Iterable[int]:
        return (self.steps,)

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        return {"token_superposition": plan.fold}


def _uneven(text: str, size: int, settings: Any, shape: Shape) -> Iterator[str]:
    """Lengths that are no whole number of bags in each slice, stratum and stride."""
    strata = settings.random_ltd_strata if settings.policy != "none" else 1
    unit = size * math.lcm(shape.slices * (settings.alternate_tokens or 1), strata)
    lengths = {"--seq-length": shape.tokens}
    if settings.seq_length_curriculum_start_length is not None:
        lengths |= {"--seq-length-curriculum-start-length": settings.seq_length_curriculum_start_length,
                    "--seq-length-curriculum-length-step": settings.seq_length_curriculum_length_step}
    for flag, length in lengths.items():
        if length % unit:
            divided = "" if unit == size else (" that divide evenly among the slices of --sequence-parallel, "
                                               "--random-ltd-strata and --alternate-tokens")
            yield (f"{text}: {flag} = {length} is not a whole number of bags{divided}; choose a multiple of {unit}, or "
                   "--token-superposition-text more")
