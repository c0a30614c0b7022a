"""The batch ramp against megatron-core's calculator, and against taking one step after another."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_ltd.plan.batch_ramp import BatchRamp


@st.composite
def ramps(draw: st.DrawFn) -> BatchRamp:
    start = draw(st.integers(1, 24))
    increment = draw(st.integers(1, 12))
    increments = draw(st.integers(1, 20))
    return BatchRamp(start + increment * increments, start, increment, draw(st.integers(1, 5000)))


def steps_one_by_one(ramp: BatchRamp, steps: int) -> list[int]:
    consumed, sizes = 0, []
    for _ in range(steps):
        sizes.append(ramp.at(consumed))
        consumed += sizes[-1]
    return sizes


@given(ramps(), st.lists(st.integers(0, 6000), min_size=1, max_size=30))
def test_the_batch_is_that_of_megatron_core(ramp: BatchRamp, consumed_samples: list[int]) -> None:
    start, increment, samples = ramp.start_samples, ramp.increment_samples, ramp.ramp_samples
    assert start is not None
    increments = (ramp.full_samples - start) // increment
    reference = RampupBatchsizeNumMicroBatchesCalculator(ramp.full_samples, 1, 1, False, 1, start, increment, samples)
    for consumed in consumed_samples:
        # Where a share of the ramp is no whole number, megatron-core's floating-point quotient may fall just below
        # the end of a share that ends exactly here.
        if samples % increments and consumed * increments % samples == 0:
            continue
        reference.update(consumed, consistency_check=False)
        assert ramp.at(consumed) == reference.get_current_global_batch_size()


@given(ramps(), st.integers(0, 400))
def test_consumed_samples_are_those_of_stepping_one_by_one(ramp: BatchRamp, steps: int) -> None:
    assert ramp.samples_after(steps) == sum(steps_one_by_one(ramp, steps))


@given(ramps(), st.integers(0, 20000))
def test_steps_within_a_budget_are_the_most_that_fit(ramp: BatchRamp, budget: int) -> None:
    steps = ramp.steps_within(budget)
    assert ramp.samples_after(steps) <= budget < ramp.samples_after(steps + 1)


@given(ramps(), st.integers(0, 100), st.integers(0, 9), st.integers(0, 200), st.integers(0, 20000))
def test_a_run_that_goes_on_with_other_batches_counts_what_is_left_from_where_it_is(
    ramp: BatchRamp, done: int, mean: int, more: int, budget: int,
) -> None:
    read = done * (1 + mean) + done // 2  # in batches that need not be of one size
    going_on, consumed = ramp.going_on(done, read), read
    assert going_on.samples_after(done) == read
    for _ in range(more):
        consumed += ramp.at(consumed)
    assert going_on.samples_after(done + more) == consumed
    steps = going_on.steps_within(budget)
    assert going_on.samples_after(steps) <= budget < going_on.samples_after(steps + 1)
    assert (steps >= done) == (budget >= read)


@given(ramps(), st.integers(0, 200))
def test_a_run_that_goes_on_with_its_own_batches_has_the_same_plan(ramp: BatchRamp, done: int) -> None:
    assert ramp.going_on(done, sum(steps_one_by_one(ramp, done))) == ramp


@given(ramps())
def test_the_batch_grows_monotonically_through_the_listed_sizes(ramp: BatchRamp) -> None:
    assume(ramp.ramp_samples < 3000)
    seen = steps_one_by_one(ramp, 600)
    assert seen == sorted(seen)
    assert set(seen) <= set(ramp.sizes())
    assert ramp.at(ramp.ramp_samples) == ramp.full_samples


def test_a_batch_without_a_ramp_is_constant() -> None:
    ramp = BatchRamp(48)
    assert {ramp.at(consumed) for consumed in (0, 1, 10**12)} == {48}
    assert ramp.samples_after(7) == 336
    assert ramp.steps_within(335) == 6
    assert ramp.sizes() == (48,)


@pytest.mark.parametrize("ramp", [BatchRamp(16, 16, 4, 1000), BatchRamp(16, 8, 4, 0)])
def test_a_ramp_of_no_height_or_no_length_is_full_from_the_start(ramp: BatchRamp) -> None:
    assert ramp.at(0) == 16
    assert ramp.samples_after(10) == 160


def test_the_documented_example_by_hand() -> None:
    ramp = BatchRamp(32, 16, 8, 300)  # two increments, one each 150 samples
    assert [ramp.at(consumed) for consumed in (0, 149, 150, 299, 300)] == [16, 16, 24, 24, 32]
    assert ramp.phases() == [(10, 16), (6, 24)]  # 0..160 in steps of 16, then 160..304 in steps of 24


@pytest.mark.parametrize("ramp", [BatchRamp(48), BatchRamp(32, 16, 8, 300)])
def test_the_steps_that_cover_samples_are_the_fewest_that_do(ramp: BatchRamp) -> None:
    for samples in range(1, 500):
        steps = ramp.steps_covering(samples)
        assert ramp.samples_after(steps) >= samples > ramp.samples_after(steps - 1)
