"""The learning rate: a pure function of progress, with nothing to save or restore.

Progress is counted in steps, samples, raw tokens or layer tokens (`megatron_ltd.plan.lr_progress`); D is the decay
length and W the warm-up, both from the start of the run:

    warm-up               init + (peak - init) x W'/W
    linear                min + (peak - min) (1 - r)             r = (n - W) / (D - W)
    cosine                min + (peak - min) (1 + cos(pi r)) / 2
    inverse-square-root   max(min, peak sqrt(max(W, 1) / max(n, 1)))
    WSD                   peak until F before D, then from peak to min by a curve over F
    constant              peak;  all others are min beyond D

The formulas are Megatron-LM's, and from the end of warm-up on so are the values: n is the progress before the step.
During warm-up a step counts itself: W' is the progress after it. In Megatron-LM W' too is the progress before the step,
so that its first step has the rate `--lr-warmup-init`, by default zero: it reads a batch and learns nothing.
"""

import math
from dataclasses import dataclass

from megatron_ltd.config import OptimizerConfig, RunConfig
from megatron_ltd.plan.derived import layer_tokens
from megatron_ltd.plan.layer_tokens import LayerTokens
from megatron_ltd.plan.lr_progress import LearningRateSpans, learning_rate_spans


@dataclass(frozen=True)
class LearningRate:
    """The learning rate over a run.

    Args:
        optimizer: peak, minimum and shapes.
        spans: the unit of progress, and the lengths of warm-up and decay in it.
        tokens: of the run, raw and layer tokens, for progress in them; None for other units.
    """

    optimizer: OptimizerConfig
    spans: LearningRateSpans
    tokens: LayerTokens | None = None

    @classmethod
    def of_run(cls, config: RunConfig, data_parallel_size: int) -> "LearningRate":
        spans = learning_rate_spans(config, data_parallel_size)
        in_tokens = spans.unit in ("tokens", "layer tokens")
        return cls(config.optimizer, spans, layer_tokens(config, data_parallel_size) if in_tokens else None)

    def at(self, step: int, consumed_samples: int, batch_samples: int,
           layer_token_sums: tuple[int, int] | None = None, raw_tokens: tuple[int, int] | None = None) -> float:
        """The rate of one step.

        Args:
            step: counted from 0.
            consumed_samples: samples of all steps before it.
            batch_samples: its own.
            layer_token_sums: tokens summed over layers, before and after it, as the run has counted them. Without
                them, what they are in a run that had these settings from its first step on.
            raw_tokens: the same, of tokens read.
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
        """Share of the way from the minimum to the peak."""
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
