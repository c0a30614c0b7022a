"""Alternate tokens: every middle layer keeps every M-th token, the next layer the tokens next to them, so that each
token is processed by every M-th layer. Nothing is random. There is no paper; it is the example in
`docs/extending.md`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_ltd.token_drop.plan import LayerPlan, StepPlan, TokenSet
from megatron_ltd.token_drop.policy import ONE_OR_MORE, Policy, Range, Shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AlternateSettings:
    """Every M-th token."""

    alternate_tokens: int | None = None
    """M: every layer but the first and the last keeps one of M neighbouring tokens, a different one in each layer."""
    alternate_tokens_steps: int | None = None
    """Steps after which --alternate-tokens ends and every layer keeps all tokens. Default: it never ends."""


@dataclass(frozen=True)
class Alternate(Policy):
    """The number of a set is the position of its first token."""

    stride: int
    steps: int | None
    layers: int

    name: ClassVar[str] = "alternate"
    Settings: ClassVar[type] = AlternateSettings
    switch: ClassVar[str] = "alternate_tokens"
    ranges: ClassVar[dict[str, Range]] = {"alternate_tokens": Range(2), "alternate_tokens_steps": ONE_OR_MORE}
    chooses_tokens: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "Alternate":
        return cls(settings.alternate_tokens, settings.alternate_tokens_steps, shape.layers)

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        stride = settings.alternate_tokens
        if shape.tokens % (stride * shape.slices):
            yield (f"--alternate-tokens = {stride}: --seq-length = {shape.tokens} must be a multiple of it in each of "
                   f"{shape.slices} slices of the sequence; choose a divisor of {shape.tokens // shape.slices}")
        if settings.seq_length_curriculum_start_length is not None:
            yield (f"--alternate-tokens = {stride} is given with --seq-length-curriculum-start-length: the lengths in "
                   "between need not be multiples; keep one of them")

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        if self.steps is not None and step >= self.steps:
            return plan
        kept = plan.read_tokens // self.stride
        return plan.with_layers((layer, LayerPlan(kept, TokenSet(self.name, layer % self.stride)))
                                for layer in range(1, self.layers - 1))

    def changes(self) -> Iterable[int]:
        return () if self.steps is None else (self.steps,)

    def rows(self, numbers: Sequence[int], sample_ids: "torch.Tensor", read_tokens: int,
             kept_tokens: int) -> "torch.Tensor":
        import torch

        from megatron_ltd.token_drop.transfer import sent
        first = sent(torch.tensor(numbers), sample_ids.device)[:, None, None]
        every = torch.arange(0, read_tokens, self.stride, device=sample_ids.device)
        return (first + every).expand(-1, len(sample_ids), -1)
