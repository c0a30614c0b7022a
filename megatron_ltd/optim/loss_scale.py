"""Dynamic loss scaling for fp16 (https://arxiv.org/abs/1710.03740, section 3.2), as in Megatron-LM."""

from dataclasses import dataclass, replace

from megatron_ltd.config import TrainingConfig


@dataclass(frozen=True)
class LossScale:
    """The scale and the state that determines its next change.

    The scale halves when gradients overflow `hysteresis` times without a window of good steps in between, and doubles
    after `window` good steps.
    """

    scale: float = 1.0
    good_steps: int = 0
    overflows_left: int = 2

    @classmethod
    def initial(cls, config: TrainingConfig) -> "LossScale":
        if config.precision != "fp16":
            return cls(1.0)
        return cls(config.loss_scale if config.loss_scale is not None else config.initial_loss_scale, 0,
                   config.hysteresis)

    def after_step(self, overflow: bool, config: TrainingConfig) -> "LossScale":
        """The scale of the next step."""
        if config.precision != "fp16" or config.loss_scale is not None:
            return self
        if overflow:
            left = self.overflows_left - 1
            if left > 0:
                return replace(self, good_steps=0, overflows_left=left)
            return LossScale(max(self.scale / 2.0, config.min_loss_scale), 0, left)
        if self.good_steps + 1 == config.loss_scale_window:
            return LossScale(self.scale * 2.0, 0, config.hysteresis)
        return replace(self, good_steps=self.good_steps + 1)

    def exhausted(self, config: TrainingConfig) -> bool:
        """Whether the scale cannot be lowered any further after an overflow."""
        fixed = config.loss_scale is not None
        return config.precision == "fp16" and not fixed and self.scale <= config.min_loss_scale
