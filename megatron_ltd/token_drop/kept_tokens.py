"""How many tokens a dropped layer keeps, and which layers drop: the common part of the policies that choose tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_ltd.errors import ConfigError, flag_name
from megatron_ltd.token_drop.lists import layer_list_problems, parse_layer_list, parse_length_list
from megatron_ltd.token_drop.plan import LayerPlan, StepPlan, TokenSet
from megatron_ltd.token_drop.policy import ONE_OR_MORE, Policy, Range, Shape
from megatron_ltd.token_drop.schedule import KeptLength, KeptSchedule, ListedLength


@dataclass(frozen=True, kw_only=True)
class KeptTokensSettings:
    """Which policy chooses tokens, how many, and in which layers."""

    random_ltd: bool = False
    """Random layerwise token dropping; short for --token-drop-policy random."""
    token_drop_policy: Literal["none", "random", "importance", "tread"] = "none"
    """Which tokens a dropped layer keeps. `random`: an independent uniform set per layer and sample. `importance`: the
    tokens whose vocabulary id has the largest running loss, the same in all dropped layers. `tread`: one uniform set
    per sample for all dropped layers, or a new one every --tread-set-layers layers."""
    random_ltd_start_length: int | None = None
    """Tokens of each sample that a dropped layer keeps at the first step. Default: 128, or half of --seq-length with
    `importance` and `tread`."""
    random_ltd_steps: int | None = None
    """Steps over which the kept length grows linearly to --seq-length. Default: it stays at the start length."""
    random_ltd_root_degree: int = 1
    """R: the kept length grows with the R-th root of the step, fast at first; 1 is linear."""
    random_ltd_length_list: str | None = None
    """The kept length as a list of STEP:LENGTH, such as `0:128,1000:256,5000:512`, instead of a growing length;
    constant after the last entry."""
    random_ltd_length_step: int = 16
    """While the kept length grows, it is a multiple of this."""
    random_ltd_layers: str | None = None
    """Dropped layers, counted from 0, as in `1-22` or `1,3,5-9`. Default: all but the first and the last; with
    `importance`, from layer num_layers / 2 - 1 to the last but one."""
    random_ltd_strata: int = 1
    """Number of equal spans of the sequence, each of which keeps the same number of tokens. With --sequence-parallel it
    must be a multiple of --tensor-model-parallel-size; the kept set depends on this number, never on the layout."""

    @property
    def policy(self) -> str:
        return "random" if self.random_ltd else self.token_drop_policy


@dataclass(frozen=True)
class KeptTokens(Policy):
    """A policy under which some layers process only some of the tokens of each sample.

    Args:
        dropped: global layer numbers, ascending.
        lengths: the kept length over the run.
    """

    dropped: tuple[int, ...]
    lengths: KeptSchedule
    seed: int
    strata: int

    switch: ClassVar[str] = "token_drop_policy"
    chooses_tokens: ClassVar[bool] = True
    ranges: ClassVar[dict[str, Range]] = {
        **dict.fromkeys(("random_ltd_start_length", "random_ltd_steps", "random_ltd_length_step",
                         "random_ltd_strata"), ONE_OR_MORE),
        "random_ltd_root_degree": Range(1, 64)}

    @classmethod
    def default_start(cls, shape: Shape) -> int:
        return shape.tokens // 2

    @classmethod
    def default_layers(cls, shape: Shape) -> tuple[int, ...]:
        return tuple(range(1, shape.layers - 1))

    @classmethod
    def is_on(cls, settings: Any) -> bool:
        return bool(settings.policy == cls.name)

    @classmethod
    def of(cls, settings: Any, shape: Shape) -> "KeptTokens":
        return cls(cls.layers_of(settings, shape), cls.lengths_of(settings, shape), shape.seed,
                   settings.random_ltd_strata)

    @classmethod
    def layers_of(cls, settings: KeptTokensSettings, shape: Shape) -> tuple[int, ...]:
        if settings.random_ltd_layers is None:
            return cls.default_layers(shape)
        return tuple(sorted(parse_layer_list(settings.random_ltd_layers)))

    @classmethod
    def lengths_of(cls, settings: KeptTokensSettings, shape: Shape) -> KeptSchedule:
        if settings.random_ltd_length_list is not None:
            return ListedLength(parse_length_list(settings.random_ltd_length_list))
        start = settings.random_ltd_start_length
        return KeptLength(cls.default_start(shape) if start is None else start, shape.tokens,
                          settings.random_ltd_steps, settings.random_ltd_length_step, settings.random_ltd_root_degree)

    @classmethod
    def check(cls, settings: KeptTokensSettings, shape: Shape) -> Iterator[str]:
        strata, slices = settings.random_ltd_strata, shape.slices
        yield from _schedule_problems(settings)
        try:
            sizes = _sizes(cls.lengths_of(settings, shape))
        except ConfigError as error:
            yield str(error)
            sizes = []
        for flag, size in [("--seq-length", shape.tokens), *sizes]:
            if size > shape.tokens and flag != "--random-ltd-length-step":
                yield f"{flag} = {size}: more than --seq-length = {shape.tokens}; choose at most {shape.tokens}"
            if size % strata:
                yield (f"{flag} = {size}: not a multiple of --random-ltd-strata = {strata}; choose "
                       f"{(size // strata + 1) * strata}, or fewer strata")
        if strata % slices:
            fitting = (strata // slices + 1) * slices
            yield (f"--random-ltd-strata = {strata}: with --sequence-parallel it must be a multiple of "
                   f"--tensor-model-parallel-size = {slices}; use --random-ltd-strata {fitting}")
        yield from layer_list_problems("--random-ltd-layers", settings.random_ltd_layers, shape.layers)
        if settings.random_ltd_layers is None and not cls.default_layers(shape):
            yield (f"--num-layers = {shape.layers}: no layer drops tokens, since by default the first and the last do "
                   "not; give --random-ltd-layers, or leave --random-ltd out")

    @classmethod
    def idle(cls, settings: Any) -> Iterator[str]:
        shared = vars(KeptTokensSettings())
        if not cls.is_on(settings):
            yield from (f"{flag_name(field)} has no effect without --token-drop-policy {cls.name}"
                        for field, default in vars(cls.Settings()).items()
                        if field not in shared and getattr(settings, field) != default)

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        return self.keeping(plan, self.lengths.at(step))

    def keeping(self, plan: StepPlan, kept_tokens: int) -> StepPlan:
        """The plan in which dropped layers keep this many of the tokens read, or all of them."""
        if kept_tokens >= plan.read_tokens:
            return plan
        return plan.with_layers((layer, self.of_layer(layer, kept_tokens)) for layer in self.dropped)

    def of_layer(self, layer: int, kept_tokens: int) -> LayerPlan:
        """The plan of a dropped layer: its own set of tokens."""
        return LayerPlan(kept_tokens, TokenSet(self.name, layer))

    def changes(self) -> Iterable[int]:
        return (step for step, _ in self.lengths.changes())


def _schedule_problems(settings: KeptTokensSettings) -> Iterator[str]:
    listed = {flag: value for flag, value in (("--random-ltd-start-length", settings.random_ltd_start_length),
                                              ("--random-ltd-steps", settings.random_ltd_steps)) if value is not None}
    if settings.random_ltd_length_list is not None and listed:
        yield (f"--random-ltd-length-list = {settings.random_ltd_length_list} is given with "
               f"{' and '.join(f'{flag} = {value}' for flag, value in listed.items())}: the list is the whole "
               "schedule; keep one of them")


def _sizes(lengths: KeptSchedule) -> list[tuple[str, int]]:
    """(flag, length) of everything that a kept length follows from."""
    if isinstance(lengths, ListedLength):
        return [("a length of --random-ltd-length-list", length)
                for length in sorted({length for _, length in lengths.entries})]
    sizes = [("--random-ltd-start-length", lengths.start_tokens)]
    if lengths.steps is not None:
        sizes.append(("--random-ltd-length-step", lengths.multiple_tokens))
    return sizes
