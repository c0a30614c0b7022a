"""The learning rate: a pure function of progress, with nothing to save or restore.

A run counts progress in one unit: steps, samples or raw tokens. It is the unit of the decay length, else of the
warm-up, else of WSD's final decay, else of the training budget; lengths in other units are converted. Samples and
tokens account for a batch size ramp; steps do not. Lengths that are not given follow from the budget. With
`--layer-token-lr` the unit is layer tokens, and lengths in tokens are in layer tokens. With D the decay length and W
the warm-up, both from the start of the run:

    warm-up               init + (peak - init) x W'/W
    linear                min + (peak - min) (1 - r)             r = (n - W) / (D - W)
    cosine                min + (peak - min) (1 + cos(pi r)) / 2
    inverse-square-root   max(min, peak sqrt(max(W, 1) / max(n, 1)))
    WSD                   peak until F before D, then from peak to min by a curve over F
    constant              peak;  all others are min beyond D

The formulas are Megatron-LM's, and after warm-up so are the values: n is the progress before the step. During warm-up a
step includes itself: W' is the progress after it. In Megatron-LM W' is also the progress before the step, so its first
step has the rate `--lr-warmup-init`, by default zero: it reads a batch and learns nothing.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig
from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.derived import batch_ramp, layer_tokens, reads_vary, total_steps
from megatron_ltd.plan.layer_tokens import LayerTokens

Unit = Literal["steps", "samples", "tokens", "layer tokens"]
UNITS: tuple[Unit, ...] = ("steps", "samples", "tokens")
"""Units in which lengths are given."""
FLAG_SUFFIX = {"steps": "iters", "samples": "samples", "tokens": "tokens", "layer tokens": "tokens"}


@dataclass(frozen=True)
class LearningRateSpans:
    """Lengths in `unit`: warm-up; the decay until the minimum is reached, warm-up included; and WSD's final decay at
    its end."""

    unit: Unit
    warmup: float
    decay: float
    final_decay: float | None


def given_lengths(optimizer: OptimizerConfig, name: str) -> dict[Unit, int]:
    """The lengths that are given, by unit.

    Args:
        name: of the length: `lr_decay`, `lr_warmup` or `lr_wsd_decay`.
    """
    values = {unit: getattr(optimizer, f"{name}_{FLAG_SUFFIX[unit]}") for unit in UNITS}
    return {unit: value for unit, value in values.items() if value}


def progress_unit(config: RunConfig) -> Unit:
    """The unit of the whole schedule."""
    if config.optimizer.layer_token_lr:
        return "layer tokens"
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        for unit in given_lengths(config.optimizer, name):
            return unit
    if config.training.train_tokens is not None:
        return "tokens"
    return "samples" if config.training.train_samples is not None else "steps"


def learning_rate_spans(config: RunConfig, dp: int, ramp: BatchRamp | None = None) -> LearningRateSpans:
    """The lengths, for settings that `settings.checks.all` accepts.

    Args:
        dp: data-parallel size, from which the default global batch size follows.
        ramp: see `total_steps`.
    """
    unit, optimizer = progress_unit(config), config.optimizer
    decay = _in_unit(config, "lr_decay", unit, dp)
    if decay is None:
        decay = whole_run(config, dp, unit, ramp)
    warmup = _in_unit(config, "lr_warmup", unit, dp) or 0.0
    if optimizer.lr_warmup_fraction is not None:
        warmup = optimizer.lr_warmup_fraction * decay
    return LearningRateSpans(unit, warmup, decay, _in_unit(config, "lr_wsd_decay", unit, dp))


def whole_run(config: RunConfig, dp: int, unit: Unit, ramp: BatchRamp | None = None) -> float:
    """The length of the run. Args: see `total_steps`."""
    return _progress(config, dp, total_steps(config, dp, ramp), unit, ramp)


def _progress(config: RunConfig, dp: int, steps: int, unit: Unit, ramp: BatchRamp | None = None) -> float:
    """Progress after so many steps."""
    if unit == "steps":
        return float(steps)
    if unit == "layer tokens":
        return layer_tokens(config, dp, ramp).sum_after(steps) / config.model.num_layers
    if unit == "tokens" and reads_vary(config):
        return float(layer_tokens(config, dp, ramp).raw_after(steps))
    samples = (ramp or batch_ramp(config, dp)).samples_after(steps)
    return float(samples * (config.model.seq_length if unit == "tokens" else 1))


def _in_unit(config: RunConfig, name: str, unit: Unit, dp: int) -> float | None:
    """The given length in the unit of the schedule. Samples and tokens are converted by the length of a sample, all
    else by the steps that it takes; lengths in tokens are in layer tokens where the schedule is."""
    for origin, length in given_lengths(config.optimizer, name).items():
        if origin == unit or (origin == "tokens" and unit == "layer tokens"):
            return float(length)
        if origin == "steps":
            return _progress(config, dp, length, unit)
        samples = length / config.model.seq_length if origin == "tokens" else length
        if unit in ("samples", "tokens"):
            return float(samples * config.model.seq_length) if unit == "tokens" else samples
        return _progress(config, dp, batch_ramp(config, dp).steps_covering(math.ceil(samples)), unit)
    return None


@dataclass(frozen=True)
class LearningRate:
    """The learning rate over a run.

    Args:
        optimizer: peak, minimum and shapes.
        spans: the unit of progress, and the lengths of warm-up and decay in it.
        tokens: raw and layer tokens of the run, for progress in tokens; None for other units.
    """

    optimizer: OptimizerConfig
    spans: LearningRateSpans
    tokens: LayerTokens | None = None

    @classmethod
    def of_run(cls, config: RunConfig, data_parallel_size: int, ramp: BatchRamp | None = None) -> "LearningRate":
        """Args: see `learning_rate_spans`."""
        spans = learning_rate_spans(config, data_parallel_size, ramp)
        in_tokens = spans.unit in ("tokens", "layer tokens")
        return cls(config.optimizer, spans, layer_tokens(config, data_parallel_size, ramp) if in_tokens else None)

    def decoupled(self) -> "LearningRate | None":
        """The schedule of --decoupled-lr, if that is given: another peak and minimum."""
        peak, least = self.optimizer.decoupled_lr, self.optimizer.decoupled_min_lr
        if peak is None:
            return None
        least = self.optimizer.min_lr if least is None else least
        return replace(self, optimizer=replace(self.optimizer, lr=peak, min_lr=least))

    def at(self, step: int, consumed_samples: int, batch_samples: int,
           layer_token_sums: tuple[int, int] | None = None, raw_tokens: tuple[int, int] | None = None) -> float:
        """The rate of one step.

        Args:
            step: counted from 0.
            consumed_samples: samples of all steps before it.
            batch_samples: samples of this step.
            layer_token_sums: tokens summed over layers, before and after the step, as counted by the run. By default
                those of a run with these settings from its first step on.
            raw_tokens: the same for tokens read.
        """
        if self.spans.unit == "steps":
            return self.at_progress(step, step + 1)
        if self.tokens is None:
            return self.at_progress(consumed_samples, consumed_samples + batch_samples)
        if self.spans.unit == "tokens":
            return self.at_progress(*(raw_tokens or (self.tokens.raw_after(step), self.tokens.raw_after(step + 1))))
        before, after = layer_token_sums or (self.tokens.sum_after(step), self.tokens.sum_after(step + 1))
        return self.at_progress(before / self.tokens.layers, after / self.tokens.layers)

    def at_progress(self, before: float, after: float) -> float:
        """The rate of a step that takes progress from `before` to `after`, in the unit of the spans."""
        assert self.optimizer.lr is not None, "the checks require --lr"
        peak, warmup = self.optimizer.lr, self.spans.warmup
        if 0 < warmup and before <= warmup:
            return self.optimizer.lr_warmup_init + (peak - self.optimizer.lr_warmup_init) * min(1.0, after / warmup)
        if self.optimizer.lr_decay_style == "constant":
            return peak
        if before > self.spans.decay:
            return self.optimizer.min_lr
        if self.optimizer.lr_decay_style == "inverse-square-root":
            return max(self.optimizer.min_lr, peak * math.sqrt(max(warmup, 1) / max(before, 1)))
        return self.optimizer.min_lr + (peak - self.optimizer.min_lr) * self._share(before)

    def _share(self, progress: float) -> float:
        """The rate's position between the minimum (0) and the peak (1)."""
        style = self.optimizer.lr_decay_style
        if style != "WSD":
            return _falling(style, (progress - self.spans.warmup) / (self.spans.decay - self.spans.warmup))
        assert self.spans.final_decay is not None, "the checks require the length of WSD's final decay"
        start = self.spans.decay - self.spans.final_decay
        if progress <= start:
            return 1.0
        return _falling(self.optimizer.lr_wsd_decay_style, (progress - start) / self.spans.final_decay)


def _falling(style: str, ratio: float) -> float:
    """A curve from 1 at ratio 0 to 0 at ratio 1."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    assert style == "exponential", style
    return 2.0 * math.pow(0.5, ratio) - 1.0
