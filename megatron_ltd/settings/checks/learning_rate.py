"""Whether the settings of the learning rate make one schedule."""

from collections.abc import Iterator

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import flag_name
from megatron_ltd.plan.derived import data_parallel_size, has_curriculum, reads_vary
from megatron_ltd.plan.learning_rate import (
    FLAG_SUFFIX,
    Unit,
    given_lengths,
    learning_rate_spans,
    progress_unit,
    whole_run,
)

Lengths = dict[str, dict[Unit, int]]
"""Lengths that are given, by name and unit."""


def learning_rate_violations(config: RunConfig, world_size: int | None) -> list[str]:
    """Everything about the learning rate, for settings that pass `value_violations`.

    Args:
        world_size: None where the run's length is not known, because of other problems.
    """
    optimizer = config.optimizer
    names = ["lr_decay", "lr_warmup"] + (["lr_wsd_decay"] if optimizer.lr_decay_style == "WSD" else [])
    lengths = {name: given_lengths(optimizer, name) for name in names}
    problems = [*_doubled(config, lengths), *_units(config, lengths)]
    if not problems and world_size is not None:
        problems += _spans(config, lengths, data_parallel_size(config, world_size))
    return problems


def _doubled(config: RunConfig, lengths: Lengths) -> Iterator[str]:
    """Lengths that are given more than once, or not at all."""
    optimizer = config.optimizer
    yield from (f"{_flags(name, given)}: one length in two units; keep one of them"
                for name, given in lengths.items() if len(given) > 1)
    if optimizer.lr_warmup_fraction is not None and lengths["lr_warmup"]:
        yield (f"--lr-warmup-fraction = {optimizer.lr_warmup_fraction}: given with "
               f"{_flags('lr_warmup', lengths['lr_warmup'])}; keep one of them")
    if optimizer.lr_decay_style == "WSD" and not lengths["lr_wsd_decay"]:
        yield ("--lr-decay-style = WSD: needs the length of the final decay; "
               "give --lr-wsd-decay-iters, --lr-wsd-decay-samples or --lr-wsd-decay-tokens")


def _units(config: RunConfig, lengths: Lengths) -> Iterator[str]:
    """Lengths in units that cannot be compared."""
    unit = progress_unit(config)
    given = [(_flags(name, {origin: length}), origin) for name, units in lengths.items()
             for origin, length in units.items()]
    # Then a sample has no fixed number of tokens.
    unlike = [flag for flag, origin in given if reads_vary(config) and {origin, unit} == {"samples", "tokens"}]
    if unlike:
        why = "a sequence curriculum" if has_curriculum(config) else "--token-superposition-text = more"
        yield (f"{' and '.join(unlike)}: the learning rate is counted in {unit} here, and with {why} "
               f"samples have no fixed number of tokens; give all its lengths in {unit} (-{FLAG_SUFFIX[unit]})")


def _spans(config: RunConfig, lengths: Lengths, dp: int) -> Iterator[str]:
    """Lengths that do not fit into the decay."""
    spans = learning_rate_spans(config, dp)
    until = f"the {spans.decay:g} {spans.unit} after which the minimum is reached; shorten it"
    if config.optimizer.lr_decay_style != "constant" and lengths["lr_decay"] and spans.warmup >= spans.decay:
        yield (f"{_flags('lr_warmup', lengths['lr_warmup'])}: warm-up is not shorter than {until}, or lengthen "
               f"--lr-decay-{FLAG_SUFFIX[spans.unit]}")
    if "lr_wsd_decay" in lengths and spans.final_decay is not None and spans.final_decay > spans.decay:
        yield f"{_flags('lr_wsd_decay', lengths['lr_wsd_decay'])}: longer than {until}"


def learning_rate_notes(config: RunConfig, world_size: int) -> Iterator[str]:
    """What is unusual about settings without violations: converted lengths, and a warm-up that does not end."""
    unit, dp = progress_unit(config), data_parallel_size(config, world_size)
    as_it_is = {unit} | ({"tokens"} if unit == "layer tokens" else set())
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        for origin, length in given_lengths(config.optimizer, name).items():
            if origin not in as_it_is and {origin, unit} != {"samples", "tokens"}:
                yield f"{_flags(name, {origin: length})}: converted to {unit}, in which the learning rate is counted"
    spans, run = learning_rate_spans(config, dp), whole_run(config, dp, unit)
    if run <= spans.warmup:
        yield (f"the run of {run:g} {unit} is not longer than the warm-up of {spans.warmup:g}: the learning rate never "
               f"reaches --lr = {config.optimizer.lr}; shorten --lr-warmup-{FLAG_SUFFIX[unit]}, or train longer")


def _flags(name: str, given: dict[Unit, int]) -> str:
    return " and ".join(f"{flag_name(name)}-{FLAG_SUFFIX[unit]} = {length}" for unit, length in given.items())
