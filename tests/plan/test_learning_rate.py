"""The learning rate against megatron-core's scheduler, in each unit, and what is meant to differ."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import OptimizerConfig, TrainingConfig
from megatron_ltd.plan.derived import total_samples, total_steps
from megatron_ltd.plan.learning_rate import LearningRate, LearningRateSpans

STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]
PEAK = 3e-4


def megatron_rate(schedule: LearningRate, progress: int, decoupled: bool = False) -> float:
    """What megatron-core sets after so much progress, of --lr or of --decoupled-lr."""
    optimizer, spans = schedule.optimizer, schedule.spans
    # The limits of --decoupled-lr are those of a group of parameters there.
    limits = {"max_lr": optimizer.decoupled_lr, "min_lr": optimizer.decoupled_min_lr}
    group = {"params": [torch.nn.Parameter(torch.zeros(1))]} | {
        name: value for name, value in limits.items() if decoupled and value is not None}
    weights = torch.optim.SGD([group], lr=0.0)
    reference: Any = OptimizerParamScheduler(
        weights, init_lr=optimizer.lr_warmup_init, max_lr=optimizer.lr, min_lr=optimizer.min_lr,
        lr_warmup_steps=spans.warmup, lr_decay_steps=spans.decay, lr_decay_style=optimizer.lr_decay_style,
        start_wd=0.0, end_wd=0.0, wd_incr_steps=1, wd_incr_style="constant", wsd_decay_steps=spans.final_decay,
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style)
    reference.step(progress)
    return weights.param_groups[0]["lr"]


@st.composite
def schedules(draw: st.DrawFn) -> LearningRate:
    decay = draw(st.integers(2, 500))
    optimizer = OptimizerConfig(
        lr=PEAK, min_lr=draw(st.sampled_from([0.0, 1e-5, PEAK])), lr_decay_style=draw(st.sampled_from(STYLES)),
        lr_warmup_init=draw(st.sampled_from([0.0, 1e-6])),
        lr_wsd_decay_style=draw(st.sampled_from(["exponential", "linear", "cosine"])))
    warmup = draw(st.integers(0, decay - 1))
    return LearningRate(optimizer, LearningRateSpans("steps", warmup, decay, draw(st.integers(1, decay))))


@given(schedules(), st.integers(0, 600))
def test_after_warm_up_every_rate_is_megatron_cores(schedule: LearningRate, step: int) -> None:
    step = max(step, int(schedule.spans.warmup))
    assert schedule.at(step, 0, 1) == pytest.approx(megatron_rate(schedule, step), rel=1e-12)


@given(schedules(), st.integers(0, 600))
def test_a_step_of_warm_up_has_the_rate_that_megatron_core_gives_the_next(schedule: LearningRate, step: int) -> None:
    if step < schedule.spans.warmup:
        assert schedule.at(step, 0, 1) == pytest.approx(megatron_rate(schedule, step + 1), rel=1e-12)


@given(schedules(), st.integers(0, 600), st.sampled_from([PEAK / 10, PEAK * 3]), st.sampled_from([None, 0.0, 2e-5]))
def test_the_decoupled_rate_is_megatron_cores(
        schedule: LearningRate, step: int, peak: float, least: float | None) -> None:
    schedule = replace(schedule, optimizer=replace(schedule.optimizer, decoupled_lr=peak, decoupled_min_lr=least))
    decoupled = schedule.decoupled()
    assert decoupled is not None
    after = max(step, int(schedule.spans.warmup))
    assert decoupled.at(after, 0, 1) == pytest.approx(megatron_rate(schedule, after, decoupled=True), rel=1e-12)


@given(schedules())
def test_no_step_of_the_run_has_a_rate_of_zero(schedule: LearningRate) -> None:
    assert all(schedule.at(step, 0, 1) > 0.0 for step in range(int(schedule.spans.decay)))


@given(schedules())
def test_rates_rise_to_the_peak_and_then_never_rise(schedule: LearningRate) -> None:
    rates = [schedule.at(step, 0, 1) for step in range(int(schedule.spans.decay) + 5)]
    top = int(schedule.spans.warmup)
    assert rates[:top] == sorted(rates[:top])
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(rates[top:], rates[top + 1:], strict=False))
    assert max(rates) <= PEAK * (1 + 1e-12)
    assert min(rates[top:]) >= schedule.optimizer.min_lr


def test_the_first_rate_of_megatron_core_is_zero_and_ours_is_not() -> None:
    schedule = LearningRate(OptimizerConfig(lr=PEAK), LearningRateSpans("steps", 10, 100, None))
    assert megatron_rate(schedule, 0) == 0.0
    assert schedule.at(0, 0, 16) == pytest.approx(PEAK / 10)


def run(optimizer: dict[str, Any], **training: Any) -> RunConfig:
    training = {"micro_batch_size": 4, "global_batch_size": 16, "train_iters": 100, **training}
    return RunConfig(model=ModelConfig(seq_length=32), training=TrainingConfig(**training),
                     optimizer=OptimizerConfig(lr=PEAK, lr_decay_style="cosine", **optimizer))


def test_the_same_lengths_in_steps_samples_and_tokens_give_the_same_rates() -> None:
    in_steps = LearningRate.of_run(run({"lr_warmup_iters": 10, "lr_decay_iters": 80}), 4)
    in_samples = LearningRate.of_run(run({"lr_warmup_samples": 160, "lr_decay_samples": 1280}), 4)
    in_tokens = LearningRate.of_run(run({"lr_warmup_tokens": 5120, "lr_decay_tokens": 40960}), 4)
    by_fraction = LearningRate.of_run(run({"lr_warmup_fraction": 0.125, "lr_decay_iters": 80}), 4)
    for step in range(100):
        rates = [schedule.at(step, 16 * step, 16) for schedule in (in_steps, in_samples, in_tokens, by_fraction)]
        assert rates == pytest.approx([rates[0]] * 4, rel=1e-12)


@pytest.mark.parametrize(("budget", "unit", "length"), [
    ({"train_iters": 100}, "steps", 100.0),
    ({"train_iters": None, "train_samples": 1607}, "samples", 1600.0),
    ({"train_iters": None, "train_tokens": 51300}, "tokens", 51200.0),
])
def test_decay_lasts_the_whole_run_by_default_in_the_unit_of_the_budget(
        budget: dict[str, Any], unit: str, length: float) -> None:
    spans = LearningRate.of_run(run({}, **budget), 4).spans
    assert (spans.unit, spans.decay) == (unit, length)


def test_a_warm_up_in_samples_makes_a_run_of_steps_count_samples() -> None:
    spans = LearningRate.of_run(run({"lr_warmup_samples": 160}), 4).spans
    assert (spans.unit, spans.warmup, spans.decay) == ("samples", 160.0, 1600.0)


def test_samples_see_a_batch_ramp_and_reach_the_peak_after_as_many_samples() -> None:
    config = run({"lr_warmup_samples": 320}, rampup_batch_size=(4, 4, 240), train_iters=None, train_samples=2000)
    schedule = LearningRate.of_run(config, 1)
    assert schedule.spans.decay == total_samples(config, 1) <= 2000
    assert schedule.at(0, 0, 4) == pytest.approx(PEAK * 4 / 320)
    assert schedule.at(30, 308, 12) == pytest.approx(PEAK)
    assert schedule.at(30, 308, 16) == pytest.approx(PEAK)  # a step that crosses the end of warm-up takes the peak


def test_a_final_decay_in_samples_is_converted_where_progress_is_in_tokens() -> None:
    config = run({"lr_decay_tokens": 51200, "lr_wsd_decay_samples": 400})
    spans = LearningRate.of_run(replace(config, optimizer=replace(config.optimizer, lr_decay_style="WSD")), 4).spans
    assert (spans.unit, spans.final_decay) == ("tokens", 12800.0)


def test_the_last_step_of_a_whole_run_is_one_step_above_the_minimum() -> None:
    config = run({"min_lr": 1e-5})
    config = replace(config, optimizer=replace(config.optimizer, lr_decay_style="linear"))
    schedule = LearningRate.of_run(config, 4)
    last = total_steps(config, 4) - 1
    assert schedule.at(last, 16 * last, 16) == pytest.approx(1e-5 + (PEAK - 1e-5) / 100)


def dropping_run(optimizer: dict[str, Any], **training: Any) -> RunConfig:
    """6 layers of which 4 keep 8 of 32 tokens, and all 32 from step 40 on; 16 samples a step."""
    config = run({"layer_token_lr": True, **optimizer}, **training)
    return replace(config, model=ModelConfig(num_layers=6, seq_length=32), token_drop=TokenDropConfig(
        random_ltd=True, random_ltd_length_list="0:8,40:32"))


def test_a_warm_up_in_layer_tokens_stretches_while_tokens_are_dropped() -> None:
    """A step processes 16 x (2 x 32 + 4 x 8) / 6 = 256 layer tokens, so 2,560 of them are ten steps; without dropping
    they would be five."""
    schedule = LearningRate.of_run(dropping_run({"lr_warmup_tokens": 2560, "lr_decay_tokens": 20_480}), 4)
    rates = [schedule.at(step, 16 * step, 16) for step in range(10)]
    assert rates == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)], rel=1e-12)
    raw = dropping_run({"lr_warmup_tokens": 2560, "lr_decay_tokens": 20_480, "layer_token_lr": False})
    rates = [LearningRate.of_run(raw, 4).at(step, 16 * step, 16) for step in range(5)]
    assert rates == pytest.approx([PEAK * (step + 1) / 5 for step in range(5)], rel=1e-12)


def test_decay_in_layer_tokens_lasts_the_whole_run_by_default() -> None:
    """40 steps of 256 and 60 of 512 layer tokens."""
    config = dropping_run({"min_lr": 1e-5, "lr_warmup_tokens": 2560})
    config = replace(config, optimizer=replace(config.optimizer, lr_decay_style="linear"))
    schedule = LearningRate.of_run(config, 4)
    assert schedule.spans.unit == "layer tokens" and schedule.spans.decay == 40 * 256 + 60 * 512
    share = 512 / (schedule.spans.decay - 2560)
    assert schedule.at(99, 1584, 16) == pytest.approx(1e-5 + (PEAK - 1e-5) * share, rel=1e-9)
    assert schedule.at(100, 1600, 16) == pytest.approx(1e-5, rel=1e-9)


def test_every_rate_by_layer_tokens_is_that_of_megatron_core_after_as_many_tokens() -> None:
    schedule = LearningRate.of_run(dropping_run({"lr_warmup_tokens": 3000, "lr_decay_tokens": 30_000}), 4)
    consumed = 0
    for step in range(110):
        processed = 256 if step < 40 else 512
        expected = megatron_rate(schedule, consumed) if consumed > 3000 else \
            megatron_rate(schedule, min(consumed + processed, 3000))
        assert schedule.at(step, 16 * step, 16) == pytest.approx(expected, rel=1e-12)
        assert schedule.at(step, 16 * step, 16) > 0.0 or consumed >= 30_000
        consumed += processed


def test_a_run_that_changed_its_settings_goes_on_from_the_layer_tokens_it_has_counted() -> None:
    schedule = LearningRate.of_run(dropping_run({"lr_warmup_tokens": 2560, "lr_decay_tokens": 20_480}), 4)
    assert schedule.at(3, 48, 16, (6 * 512, 6 * 768)) == pytest.approx(PEAK * 768 / 2560)
    assert schedule.at(3, 48, 16, (6 * 768, 6 * 1024)) == schedule.at(3, 48, 16)


def test_layer_tokens_that_are_no_whole_number_are_not_rounded() -> None:
    """5 layers of which 3 keep 8 of 32 tokens: 88 / 5 x 16 = 281.6 layer tokens a step."""
    config = dropping_run({"lr_warmup_tokens": 2816, "lr_decay_tokens": 20_480})
    config = replace(config, model=ModelConfig(num_layers=5, seq_length=32))
    schedule = LearningRate.of_run(config, 4)
    assert [schedule.at(step, 16 * step, 16) for step in (0, 4, 9)] == pytest.approx(
        [PEAK * 0.1, PEAK * 0.5, PEAK], rel=1e-12)


def test_wsd_decays_at_the_end_by_layer_tokens() -> None:
    config = dropping_run({"lr_decay_tokens": 40_960, "lr_wsd_decay_tokens": 5120})
    schedule = LearningRate.of_run(replace(config, optimizer=replace(
        config.optimizer, lr_decay_style="WSD", lr_wsd_decay_style="linear")), 4)
    assert (schedule.spans.unit, schedule.spans.final_decay) == ("layer tokens", 5120.0)
    # 40 steps of 256, then 512 a step: 35,840 are reached after 90, 5,120 before the end.
    assert [schedule.at(step, 16 * step, 16) for step in (90, 95, 99)] == pytest.approx(
        [PEAK, PEAK / 2, PEAK / 10], rel=1e-9)
