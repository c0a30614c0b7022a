"""Random-LTD (https://arxiv.org/abs/2211.11586, section 3): every dropped layer keeps its own uniform random set of
each sample's tokens; the kept length grows to the whole sample. For the two-stage variant give a list of two
lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_ltd.errors import flag_name
from megatron_ltd.token_drop.kept_tokens import KeptTokens, KeptTokensSettings
from megatron_ltd.token_drop.policy import Shape

if TYPE_CHECKING:
    import torch

SCHEDULE = ("random_ltd_start_length", "random_ltd_steps", "random_ltd_length_step", "random_ltd_root_degree",
            "random_ltd_length_list", "random_ltd_layers", "random_ltd_strata")


@dataclass(frozen=True)
class RandomTokens(KeptTokens):
    """Uniform sets; the number of a set takes the layer's place in the hash."""

    def rows(self, numbers: Sequence[int], sample_ids: "torch.Tensor", read_tokens: int,
             kept_tokens: int) -> "torch.Tensor":
        import torch

        from megatron_ltd.token_drop.sampling import kept_positions
        from megatron_ltd.token_drop.transfer import sent
        layers = sent(torch.tensor(numbers), sample_ids.device)
        return kept_positions(self.seed, sample_ids, layers, sequence_tokens=read_tokens, kept_tokens=kept_tokens,
                              strata=self.strata)


class RandomLTD(RandomTokens):
    name: ClassVar[str] = "random"
    Settings: ClassVar[type] = KeptTokensSettings

    @classmethod
    def asked_for(cls, settings: KeptTokensSettings) -> str:
        return "--random-ltd"

    @classmethod
    def default_start(cls, shape: Shape) -> int:
        return 128

    @classmethod
    def check(cls, settings: KeptTokensSettings, shape: Shape) -> Iterator[str]:
        if settings.random_ltd and settings.token_drop_policy not in ("none", "random"):
            yield (f"--random-ltd is given with --token-drop-policy = {settings.token_drop_policy}: a run has one "
                   "policy; keep one of them")
        yield from super().check(settings, shape)

    @classmethod
    def idle(cls, settings: KeptTokensSettings) -> Iterator[str]:
        """For all policies that choose tokens, since they share the schedule."""
        default = KeptTokensSettings()
        fields: tuple[str, ...] = SCHEDULE
        why = "without --random-ltd: no token is dropped"
        if settings.policy != "none":
            fields = () if settings.random_ltd_steps is not None else ("random_ltd_length_step",
                                                                       "random_ltd_root_degree")
            why = "without --random-ltd-steps: the kept length does not grow"
        yield from (f"{flag_name(field)} has no effect {why}" for field in fields
                    if getattr(settings, field) != getattr(default, field))
