"""What a run says at its end, by hand."""

import pytest

from megatron_ltd.token_drop.accounting import Consumed
from megatron_ltd.train.report.summary import StepTimes, summary
from tests.plans import plan_of

CONSUMED = Consumed(steps=9, samples=36, tokens=36 * 512, layer_token_sum=6 * 36 * 256 + 1, flops=60, full_flops=80)


def timed(*steps: tuple[int, int, float, int]) -> StepTimes:
    times = StepTimes(full_tokens=512, full_flops=100)
    for kept, samples, seconds, flops in steps:
        times.add(plan_of(512, 6, kept, range(1, 5)), samples=samples, seconds=seconds, sample_flops=flops)
    return times


def test_tokens_flops_and_the_theoretical_saving_are_those_of_the_counters() -> None:
    (line,) = summary(CONSUMED, 6, timed((512, 4, 1.0, 100)))
    assert line == ("consumed in 9 steps: 18432 raw tokens, 9216 layer tokens (50.0%), 60 FLOPs; without dropping the "
                    "same tokens take 80: theoretical saving 25.0%")


def test_the_time_saved_compares_samples_and_leaves_the_first_step_of_each_kind_out() -> None:
    times = timed((128, 2, 99.0, 40), (128, 2, 1.0, 40), (256, 4, 2.6, 70), (512, 4, 99.0, 100), (512, 4, 4.0, 100),
                  (600, 2, 2.0, 100))
    # 3.6 s for 6 samples against 6 s for 6; (2 x 40 + 4 x 70) / 600 of the FLOPs
    assert times.time_saving == pytest.approx(0.4) and times.flops_saving == pytest.approx(0.4)
    _, line = summary(CONSUMED, 6, times)
    assert line.startswith("time saved: 40.0% in steps with 128 to 256 of 512 tokens kept, whose FLOPs fell by 40.0% "
                           "(600 ms a sample rather than 1000 at the full length; 3 and 3 steps")


@pytest.mark.parametrize(("steps", "missing"), [
    ([(128, 4, 1.0, 40), (128, 4, 1.0, 40)], "at the full length"),
    ([(128, 4, 1.0, 40), (128, 4, 1.0, 40), (512, 4, 2.0, 100)], "at the full length"),
    ([(128, 4, 1.0, 40), (512, 4, 2.0, 100), (512, 4, 2.0, 100)], "with dropped tokens"),
])
def test_what_was_not_measured_is_said_not_to_be(steps: list[tuple[int, int, float, int]], missing: str) -> None:
    times = timed(*steps)
    assert times.time_saving is None
    assert summary(CONSUMED, 6, times)[1] == f"time saved: not measured, since this process timed no step {missing}"


def test_steps_with_skipped_layers_are_compared_with_whole_ones_and_cut_samples_with_none() -> None:
    times = timed((512, 4, 99.0, 100), (512, 4, 4.0, 100))
    for seconds in (99.0, 2.0):
        times.add(plan_of(512, 6, skipped=(1, 4)), samples=4, seconds=seconds, sample_flops=60)
    times.add(plan_of(256, 6), samples=4, seconds=50.0, sample_flops=40)
    assert times.time_saving == pytest.approx(0.5) and times.flops_saving == pytest.approx(0.4)
    _, line = summary(CONSUMED, 6, times)
    assert "512 to 512 of 512 tokens kept and up to 2 layers skipped, whose FLOPs fell" in line


def test_a_run_that_did_nothing_has_a_summary_too() -> None:
    (line,) = summary(Consumed(), 6, timed())
    assert "0 raw tokens" in line and "saving 0.0%" in line
