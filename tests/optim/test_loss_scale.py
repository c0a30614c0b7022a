"""Dynamic loss scaling, by hand and against megatron-core's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.optimizer import grad_scaler

from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.optim.loss_scale import LossScale


def scales(config: TrainingConfig, overflows: str) -> list[float]:
    """The scale before each step and after the last; `x` is an overflow."""
    scale = LossScale.initial(config)
    found = [scale.scale]
    for step in overflows:
        scale = scale.after_step(step == "x", config)
        found.append(scale.scale)
    return found


def fp16(**settings: Any) -> TrainingConfig:
    return TrainingConfig(**({"fp16": True, "initial_loss_scale": 64.0, "loss_scale_window": 3, "hysteresis": 2}
                             | settings))


@pytest.mark.parametrize(("overflows", "expected"), [
    ("...", [64, 64, 64, 128]),
    ("......", [64, 64, 64, 128, 128, 128, 256]),
    ("x", [64, 64]),
    ("xx", [64, 64, 32]),
    ("xxx", [64, 64, 32, 16]),  # once used up, every overflow halves
    ("x.x", [64, 64, 64, 32]),  # a good step between does not give hysteresis back
    ("x...x", [64, 64, 64, 64, 128, 128]),  # a window of good steps does
    ("..x...", [64, 64, 64, 64, 64, 64, 128]),  # an overflow starts the window again
    ("xx..xx...x", [64, 64, 32, 32, 32, 16, 8, 8, 8, 16, 16]),
])
def test_the_rules_by_hand(overflows: str, expected: list[float]) -> None:
    assert scales(fp16(), overflows) == expected


class MegatronScaler:
    """megatron-core's scaler on a machine without a GPU: its tensors are made on the CPU."""

    def __init__(self, config: TrainingConfig, patch: pytest.MonkeyPatch):
        on_cpu = SimpleNamespace(**{name: getattr(torch, name) for name in ("float", "max")},
                                 tensor=lambda values, dtype, device: torch.tensor(values, dtype=dtype))
        patch.setattr(grad_scaler, "torch", on_cpu)
        self.scaler = grad_scaler.DynamicGradScaler(
            config.initial_loss_scale, config.min_loss_scale, 2.0, 0.5, config.loss_scale_window, config.hysteresis)

    def after(self, overflow: bool) -> float:
        self.scaler.update(overflow)
        return float(self.scaler.scale)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1.0, 4.0, 64.0]))
def test_the_rules_are_those_of_megatron_core(overflows: list[bool], window: int, hysteresis: int,
                                              smallest: float) -> None:
    config = fp16(loss_scale_window=window, hysteresis=hysteresis, min_loss_scale=smallest)
    with pytest.MonkeyPatch.context() as patch:
        megatron = MegatronScaler(config, patch)
        expected = [64.0] + [megatron.after(overflow) for overflow in overflows]
    assert scales(config, "".join("x" if overflow else "." for overflow in overflows)) == expected


def test_the_scale_stops_at_its_minimum_and_says_so() -> None:
    config = fp16(initial_loss_scale=8.0, min_loss_scale=3.0, hysteresis=1)
    assert scales(config, "xxx") == [8.0, 4.0, 3.0, 3.0]
    scale = LossScale.initial(config)
    states = []
    for _ in range(3):
        states.append(scale.exhausted(config))
        scale = scale.after_step(True, config)
    assert states == [False, False, True]


def test_a_fixed_scale_stays() -> None:
    config = fp16(loss_scale=1024.0)
    assert set(scales(config, "xx....xx")) == {1024.0}
    assert not LossScale(1.0).exhausted(fp16(loss_scale=1.0))


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_without_fp16_there_is_no_scale(precision: dict[str, Any]) -> None:
    config = TrainingConfig(**precision)
    assert set(scales(config, "xx....xx" * 200)) == {1.0}
    assert not LossScale.initial(config).exhausted(config)


def test_the_defaults_are_megatrons() -> None:
    config = TrainingConfig(fp16=True)
    assert LossScale.initial(config) == LossScale(2.0**32, 0, 2)
    assert config.loss_scale_window == 1000 and config.min_loss_scale == 1.0
