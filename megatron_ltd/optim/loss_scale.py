"""Dynamic loss scaling for fp16 (https://arxiv.org/abs/1710.03740, section 3.2), as in Megatron-LM.

A step needs the scale before the host knows whether the one before it overflowed. So the device keeps a copy of the
state, as a tensor, and the host follows by the same rules.
"""

from dataclasses import dataclass

import torch

from megatron_ltd.config.training import TrainingConfig


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

    def on(self, device: torch.device) -> torch.Tensor:
        """The state on a device, without waiting for it. Shapes: [3] fp64"""
        return torch.stack([torch.full((), float(number), dtype=torch.float64, device=device)
                            for number in (self.scale, self.good_steps, self.overflows_left)])

    def after_step(self, overflow: bool, config: TrainingConfig) -> "LossScale":
        """The scale of the next step."""
        cpu = torch.device("cpu")
        scale, good_steps, left = after_step(self.on(cpu), torch.tensor(overflow), config).tolist()
        return LossScale(scale, int(good_steps), int(left))

    def exhausted(self, config: TrainingConfig) -> bool:
        """Whether the scale cannot be lowered any further after an overflow."""
        fixed = config.loss_scale is not None
        return config.precision == "fp16" and not fixed and self.scale <= config.min_loss_scale


def after_step(state: torch.Tensor, overflow: torch.Tensor, config: TrainingConfig) -> torch.Tensor:
    """The state for the next step.

    Shapes:
        state [3] fp64 (`LossScale.on`), overflow scalar bool -> [3]
    """
    if config.precision != "fp16" or config.loss_scale is not None:
        return state
    scale, good_steps, left = state
    overflowed = torch.stack((torch.where(left > 1, scale, (scale / 2.0).clamp(min=config.min_loss_scale)),
                              torch.zeros_like(scale), left - 1))
    grown = torch.stack((scale * 2.0, torch.zeros_like(scale), torch.full_like(scale, config.hysteresis)))
    good = torch.stack((scale, good_steps + 1, left))
    return torch.where(overflow, overflowed, torch.where(good_steps + 1 == config.loss_scale_window, grown, good))
