"""In which unit the learning rate's progress is counted, and how long warm-up and decay are in it.

A run has one unit: steps, samples or raw tokens. It is that of the decay length, else of the warm-up, else of WSD's
final decay, else of the training budget. Samples and tokens see a batch-size ramp as it is; steps do not. Lengths that
are not given follow from the budget. With `--layer-token-lr` the unit is layer tokens, and lengths in tokens are taken
to be lengths in those.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ltd.config import OptimizerConfig, RunConfig
from megatron_ltd.plan.derived import has_curriculum, layer_tokens, total_samples, total_steps

Unit = Literal["steps", "samples", "tokens", "layer tokens"]
UNITS: tuple[Unit, ...] = ("steps", "samples", "tokens")
"""Units in which lengths are given."""
FLAG_SUFFIX = {"steps": "iters", "samples": "samples", "tokens": "tokens", "layer tokens": "tokens"}


@dataclass(frozen=True)
class LearningRateSpans:
    """Lengths in `unit`: warm-up, everything until the minimum is reached, and WSD's final decay at the end of it."""

    unit: Unit
    warmup: float
    decay: float
    final_decay: float | None


def given_decay(optimizer: OptimizerConfig) -> dict[Unit, int]:
    """Decay lengths that are set, by unit."""
    values = (optimizer.lr_decay_iters, optimizer.lr_decay_samples, optimizer.lr_decay_tokens)
    return {unit: value for unit, value in zip(UNITS, values, strict=True) if value is not None}


def given_warmup(optimizer: OptimizerConfig) -> dict[Unit, int]:
    """Warm-up lengths that are set, by unit."""
    values = (optimizer.lr_warmup_iters, optimizer.lr_warmup_samples, optimizer.lr_warmup_tokens)
    return {unit: value for unit, value in zip(UNITS, values, strict=True) if value != 0}


def given_final_decay(optimizer: OptimizerConfig) -> dict[Unit, int]:
    """Lengths of WSD's final decay that are set, by unit."""
    values = (optimizer.lr_wsd_decay_iters, optimizer.lr_wsd_decay_samples, optimizer.lr_wsd_decay_tokens)
    return {unit: value for unit, value in zip(UNITS, values, strict=True) if value is not None}


def progress_unit(config: RunConfig) -> Unit:
    """The unit of the whole schedule."""
    optimizer = config.optimizer
    if optimizer.layer_token_lr:
        return "layer tokens"
    for given in (given_decay(optimizer), given_warmup(optimizer), given_final_decay(optimizer)):
        for unit in given:
            return unit
    if config.training.train_tokens is not None:
        return "tokens"
    return "samples" if config.training.train_samples is not None else "steps"


def convertible(origin: Unit, unit: Unit) -> bool:
    """Whether a length in `origin` has a value in `unit`: steps have none in samples, since a batch may grow; and only
    tokens are taken for layer tokens."""
    if unit == "layer tokens":
        return origin == "tokens"
    return (origin == "steps") == (unit == "steps")


def learning_rate_spans(config: RunConfig, dp: int) -> LearningRateSpans:
    """The lengths, for settings that `settings.checks.all` accepts.

    Args:
        dp: data-parallel size, from which the default global batch size follows.
    """
    unit = progress_unit(config)
    optimizer = config.optimizer
    whole = {"steps": total_steps, "samples": total_samples, "tokens": _total_tokens,
             "layer tokens": _total_layer_tokens}[unit]
    decay = _in_unit(given_decay(optimizer), unit, config.model.seq_length)
    length = decay if decay is not None else float(whole(config, dp))
    warmup = _in_unit(given_warmup(optimizer), unit, config.model.seq_length) or 0.0
    if optimizer.lr_warmup_fraction is not None:
        warmup = optimizer.lr_warmup_fraction * length
    final = _in_unit(given_final_decay(optimizer), unit, config.model.seq_length)
    return LearningRateSpans(unit, warmup, length, final)


def _total_tokens(config: RunConfig, dp: int) -> int:
    if has_curriculum(config):
        return layer_tokens(config, dp).raw_after(total_steps(config, dp))
    return total_samples(config, dp) * config.model.seq_length


def _total_layer_tokens(config: RunConfig, dp: int) -> float:
    return layer_tokens(config, dp).sum_after(total_steps(config, dp)) / config.model.num_layers


def _in_unit(given: dict[Unit, int], unit: Unit, seq_length: int) -> float | None:
    for origin, length in given.items():
        if origin == unit or unit == "layer tokens":
            return float(length)
        return float(length * seq_length) if unit == "tokens" else length / seq_length
    return None
