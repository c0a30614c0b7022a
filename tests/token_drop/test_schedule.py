"""The kept length over a run, by hand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.token_drop.schedule import KeptLength, ListedLength, integer_root


def test_the_published_gpt_schedule() -> None:
    """128 to 2,048 tokens by 16 over 200,000 steps."""
    kept = KeptLength(start_tokens=128, full_tokens=2048, steps=200_000, multiple_tokens=16)
    lengths = [kept.at(step) for step in range(200_001)]
    assert lengths[0] == 128 and lengths[-1] == 2048
    assert sorted(set(lengths)) == list(range(128, 2049, 16)) and len(set(lengths)) == 121
    assert lengths == sorted(lengths)
    # 1,920 tokens of growth: 16 more after every 200,000 / 120 steps, which is 1,666 and two thirds.
    changes = [step for step in range(1, 200_001) if lengths[step] != lengths[step - 1]]
    assert changes[:4] == [1667, 3334, 5000, 6667] and changes[-1] == 200_000
    assert (kept.at(100_000), kept.at(199_999)) == (1088, 2032)


@pytest.mark.parametrize("step", [200_000, 200_001, 10**9, 2**63])
def test_the_length_saturates_at_the_sequence(step: int) -> None:
    assert KeptLength(128, 2048, 200_000, 16).at(step) == 2048


def test_rounding_down_never_falls_below_the_start() -> None:
    """Rounded down to a multiple alone, a start of 10 with multiples of 16 would keep no token at all."""
    kept = KeptLength(start_tokens=10, full_tokens=1024, steps=1000, multiple_tokens=16)
    lengths = [kept.at(step) for step in range(1001)]
    assert lengths[:7] == [10, 10, 10, 10, 10, 10, 16]
    assert min(lengths) == 10 and lengths == sorted(lengths) and lengths[-1] == 1024


def test_a_full_length_that_is_no_multiple_is_reached() -> None:
    kept = KeptLength(start_tokens=32, full_tokens=197, steps=3910, multiple_tokens=8)
    assert kept.at(3909) == 192 and kept.at(3910) == 197


def test_without_a_number_of_steps_the_length_stays() -> None:
    kept = KeptLength(start_tokens=40, full_tokens=512, multiple_tokens=16)
    assert {kept.at(step) for step in (0, 1, 1000, 10**9)} == {40}


def test_a_start_at_full_length_drops_nothing() -> None:
    assert {KeptLength(512, 512, 100, 16).at(step) for step in range(120)} == {512}


@given(st.integers(1, 4096), st.integers(0, 4096), st.integers(1, 10**7), st.integers(1, 128), st.integers(0, 10**7))
def test_the_length_is_the_exact_formula(start: int, growth: int, steps: int, multiple: int, step: int) -> None:
    """k(t) = floor(min + (max - min) t / T) in fractions; floating point may round across a whole number."""
    length = KeptLength(start, start + growth, steps, multiple).at(step)
    exact = int(start + growth * min(Fraction(step, steps), Fraction(1)))
    if step >= steps:
        assert length == start + growth
    else:
        assert length == max(start, exact // multiple * multiple)


def test_a_square_root_grows_fast_at_first() -> None:
    """A quarter of the way in steps is half of the way in length: 128 + 1,920 x sqrt(t / T)."""
    kept = KeptLength(128, 2048, 100_000, root_degree=2)
    assert [kept.at(step) for step in (0, 1_000, 25_000, 49_000, 81_000, 100_000)] == [128, 320, 1088, 1472, 1856, 2048]
    assert kept.at(24_999) == 1087
    cubic = KeptLength(100, 1100, 1_000, multiple_tokens=8, root_degree=3)
    assert cubic.at(1) == 200 and cubic.at(125) == 600 and cubic.at(124) == 592 and cubic.at(1_000) == 1100


@given(st.integers(0, 10**40), st.integers(1, 20))
def test_the_integer_root_is_exact(value: int, degree: int) -> None:
    root = integer_root(value, degree)
    assert root**degree <= value < (root + 1)**degree


@given(st.integers(1, 600), st.integers(0, 600), st.integers(1, 300), st.integers(1, 64), st.integers(1, 5))
def test_a_growing_length_is_monotone_bounded_and_in_buckets(
        start: int, growth: int, steps: int, multiple: int, degree: int) -> None:
    kept = KeptLength(start, start + growth, steps, multiple, degree)
    lengths = [kept.at(step) for step in range(steps + 3)]
    assert lengths == sorted(lengths) and lengths[0] == start and lengths[-3:] == [start + growth] * 3
    assert all(length in (start, start + growth) or length % multiple == 0 for length in lengths)
    for step, length in enumerate(lengths[:steps]):  # k - min <= (max - min) (t / T)^(1/R), in whole numbers
        assert (length - start)**degree * steps <= growth**degree * step
        if multiple == 1:
            assert (length - start + 1)**degree * steps > growth**degree * step


@given(st.integers(1, 200), st.integers(0, 200), st.none() | st.integers(1, 150), st.integers(1, 64), st.integers(1, 4))
def test_the_stretches_are_those_of_the_lengths_step_by_step(
        start: int, growth: int, steps: int | None, multiple: int, degree: int) -> None:
    kept = KeptLength(start, start + growth, steps, multiple, degree)
    lengths = [kept.at(step) for step in range((steps or 5) + 3)]
    changes = [(step, length) for step, length in enumerate(lengths) if step == 0 or length != lengths[step - 1]]
    assert list(kept.changes()) == changes


def test_a_list_holds_each_length_from_its_step_on() -> None:
    kept = ListedLength(((0, 128), (1000, 256), (2000, 256), (5000, 512)))
    assert [kept.at(step) for step in (0, 999, 1000, 2500, 4999, 5000, 10**9)] == [128, 128, 256, 256, 256, 512, 512]
    assert kept.changes() == ((0, 128), (1000, 256), (5000, 512))
