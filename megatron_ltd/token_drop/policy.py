"""The interface of a policy. `docs/extending.md` shows how to add one, step by step.

A policy is a file in `policies/` and a line in `registry.py`. It changes the plan of a step; everything else (stack,
pipeline split, FLOPs, layer tokens, compilation, log line) reads the plan.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from megatron_ltd.errors import flag_name
from megatron_ltd.token_drop.plan import StepPlan

if TYPE_CHECKING:
    import torch


class Range(NamedTuple):
    """Allowed range of a number; the bounds are included unless they are open."""

    low: float
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        if self.high is None:
            return above
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.low_open else f"at least {self.low}"
        if self.high is None:
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high}"


ONE_OR_MORE = Range(1)
BELOW_ONE = Range(0, 1, high_open=True)


@dataclass(frozen=True)
class Shape:
    """What a policy may know about the run besides its own settings.

    Args:
        family: gpt, bert or vit.
        layers: number of layers in the model.
        tokens: tokens of a sample, s.
        seed: of the run.
        slices: equal parts of the sequence that sequence parallelism holds on different devices; 1 without it.
        predictions: maximum number of tokens that BERT predicts per sample; None for other models.
    """

    family: str
    layers: int
    tokens: int
    seed: int = 0
    slices: int = 1
    predictions: int | None = None


class Policy:
    """A way to compute less: a pure function of (seed, step, layer, sample).

    Subclasses are frozen dataclasses of plain values, made by `of`, and override what they change. Nothing here may
    import torch, except inside `rows`: a mistake in the settings is reported before torch is loaded.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    """A frozen dataclass of the policy's flags; the literal under a field is its documentation."""
    switch: ClassVar[str]
    """The field that enables the policy, unless it has its default."""
    ranges: ClassVar[dict[str, Range]] = {}
    """Allowed values of the numbers in the settings, by field."""
    chooses_tokens: ClassVar[bool] = False
    """Whether the policy decides which tokens a layer keeps; only one policy of a run may do so."""
    skips_layers: ClassVar[bool] = False
    """Whether the policy decides which layers are skipped; only one policy of a run may do so."""
    is_drawn: ClassVar[bool] = False
    """Whether the plan of a step is drawn at random, so that sums over steps have no closed form."""

    @classmethod
    def is_on(cls, settings: Any) -> bool:
        """Whether the settings enable the policy."""
        return bool(getattr(settings, cls.switch) != getattr(cls.Settings(), cls.switch))

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "Policy":
        """The policy, if the settings enable it.

        Raises:
            ConfigError: the settings cannot be parsed; `check` reports this too.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, settings: Any, shape: Shape) -> Iterator[str]:
        """Problems with the settings, if they enable the policy: setting = value, constraint, remedy."""
        yield from ()

    @classmethod
    def idle(cls, settings: Any) -> Iterator[str]:
        """Settings that are given and have no effect."""
        if not cls.is_on(settings):
            yield from (f"{flag_name(field)} has no effect without {flag_name(cls.switch)}"
                        for field, default in vars(cls.Settings()).items()
                        if field != cls.switch and getattr(settings, field) != default)

    @classmethod
    def asked_for(cls, settings: Any) -> str:
        """The setting that enables the policy and its value, for messages."""
        return f"{flag_name(cls.switch)} = {getattr(settings, cls.switch)}"

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        """The plan of a step, counted from 0, changed by this policy.

        Args:
            plan: the plan as changed by the policies before this one in the registry.
        """
        raise NotImplementedError

    def changes(self) -> Iterable[int]:
        """Steps at which the plan changes, unless it is drawn at random; 0 may be omitted."""
        return ()

    def share(self, layer: int) -> float:
        """Share of the run's steps in which the layer is expected not to be skipped."""
        return 1.0

    def rows(self, numbers: Sequence[int], sample_ids: "torch.Tensor", read_tokens: int,
             kept_tokens: int) -> "torch.Tensor":
        """Positions of the kept tokens, ascending, for each of several sets.

        Args:
            numbers: of the sets (`TokenSet.number`).
            sample_ids: global sample indices, [b] int64.

        Shapes:
            -> [l, b, k] int64, l sets of k = `kept_tokens` out of `read_tokens` positions
        """
        raise NotImplementedError

    def log_fields(self, plan: StepPlan) -> dict[str, Any]:
        """This policy's fields in a step's line of the metrics file."""
        return {}


def misfits(flag: str, size: int, units: Collection[tuple[str, int]]) -> Iterator[str]:
    """Messages for the units that do not divide a length."""
    for what, unit in units:
        if size % unit:
            yield f"{flag} = {size}: not a multiple of {what}; choose {(size // unit + 1) * unit}"
