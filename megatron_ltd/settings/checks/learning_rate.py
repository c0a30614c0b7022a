"""Whether the settings of the learning rate make one schedule."""

from collections.abc import Iterator

from megatron_ltd.config import RunConfig
from megatron_ltd.plan.derived import data_parallel_size, has_curriculum
from megatron_ltd.plan.lr_progress import (
    FLAG_SUFFIX,
    Unit,
    convertible,
    given_decay,
    given_final_decay,
    given_warmup,
    learning_rate_spans,
    progress_unit,
)


def learning_rate_violations(config: RunConfig, world_size: int | None) -> list[str]:
    """Everything about the learning rate, for settings that pass `value_violations`.

    Args:
        world_size: None where the run's length is not known, because of other problems.
    """
    problems = [*_rates(config), *_units(config)]
    if not problems and world_size is not None:
        problems += _lengths(config, data_parallel_size(config, world_size))
    return problems


def _rates(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    assert optimizer.lr is not None, "value_violations requires --lr"
    for flag, rate in (("--min-lr", optimizer.min_lr), ("--lr-warmup-init", optimizer.lr_warmup_init)):
        if rate > optimizer.lr:
            yield f"{flag} = {rate}: more than the peak --lr = {optimizer.lr}; choose at most that"


def _units(config: RunConfig) -> Iterator[str]:
    """Each length at most once, and all in units that can be compared."""
    optimizer = config.optimizer
    spans = {"lr-decay": given_decay(optimizer), "lr-warmup": given_warmup(optimizer),
             "lr-wsd-decay": given_final_decay(optimizer)}
    if optimizer.lr_decay_style != "WSD":
        del spans["lr-wsd-decay"]
    for name, given in spans.items():
        if len(given) > 1:
            yield f"{_flags(name, given)}: one length in two units; keep one of them"
    if optimizer.lr_warmup_fraction is not None and spans["lr-warmup"]:
        yield (f"--lr-warmup-fraction = {optimizer.lr_warmup_fraction}: given with "
               f"{_flags('lr-warmup', spans['lr-warmup'])}; keep one of them")
    if optimizer.lr_decay_style == "WSD" and not spans["lr-wsd-decay"]:
        yield ("--lr-decay-style = WSD: needs the length of the final decay; "
               "give --lr-wsd-decay-iters, --lr-wsd-decay-samples or --lr-wsd-decay-tokens")
    unit = progress_unit(config)
    foreign = [_flags(name, {origin: length}) for name, given in spans.items() for origin, length in given.items()
               if not convertible(origin, unit)]
    if has_curriculum(config) and unit in ("samples", "tokens"):
        yield from _without_conversion(spans, unit)
    if foreign and unit == "layer tokens":
        yield (f"{' and '.join(foreign)}: with --layer-token-lr the learning rate is counted in layer tokens; give all "
               "its lengths in tokens (-tokens), or leave --layer-token-lr out")
    elif foreign and all(len(given) <= 1 for given in spans.values()):
        yield (f"{' and '.join(foreign)}: the learning rate is counted in {unit} here, and steps have no fixed "
               "number of samples; give all its lengths in steps (-iters), or all in samples or tokens")


def _without_conversion(spans: dict[str, dict[Unit, int]], unit: Unit) -> Iterator[str]:
    """Under a sequence curriculum a sample has no fixed number of tokens."""
    other: Unit = "tokens" if unit == "samples" else "samples"
    foreign = [_flags(name, {other: given[other]}) for name, given in spans.items() if other in given]
    if foreign:
        yield (f"{' and '.join(foreign)}: the learning rate is counted in {unit} here, and with a sequence curriculum "
               f"samples have no fixed number of tokens; give all its lengths in {unit} (-{FLAG_SUFFIX[unit]})")


def _lengths(config: RunConfig, dp: int) -> Iterator[str]:
    spans = learning_rate_spans(config, dp)
    style = config.optimizer.lr_decay_style
    if style != "constant" and spans.warmup >= spans.decay:
        yield (f"{_flags('lr-warmup', given_warmup(config.optimizer))}: warm-up is not shorter than the "
               f"{spans.decay:g} {spans.unit} after which the minimum is reached; shorten it, or lengthen "
               f"--lr-decay-{FLAG_SUFFIX[spans.unit]}")
    if style == "WSD" and spans.final_decay is not None and spans.final_decay > spans.decay:
        yield (f"{_flags('lr-wsd-decay', given_final_decay(config.optimizer))}: longer than the {spans.decay:g} "
               f"{spans.unit} after which the minimum is reached; shorten it")


def _flags(name: str, given: dict[Unit, int]) -> str:
    return " and ".join(f"--{name}-{FLAG_SUFFIX[unit]} = {length}" for unit, length in given.items())
