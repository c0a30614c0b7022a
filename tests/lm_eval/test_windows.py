"""Windows predict every token once, with as much context as they promise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.requests import ScoreRow
from megatron_ltd.lm_eval.rows import rolling_windows, sliding_windows


def predictions(rows: list[ScoreRow]) -> list[int]:
    return [token for row in rows for token in row.tokens[row.first_scored:]]


def test_rolling_windows_are_the_ones_drawn_in_the_module() -> None:
    assert list(rolling_windows(list(range(10)), 4)) == [
        ScoreRow([0, 1, 2, 3, 4], 1), ScoreRow([4, 5, 6, 7, 8], 1), ScoreRow([5, 6, 7, 8, 9], 4)
    ]


def test_sliding_windows_are_the_ones_drawn_in_the_module() -> None:
    assert list(sliding_windows(list(range(10)), 4, 2)) == [
        ScoreRow([0, 1, 2, 3, 4], 1), ScoreRow([2, 3, 4, 5, 6], 3), ScoreRow([4, 5, 6, 7, 8], 3),
        ScoreRow([6, 7, 8, 9], 3),
    ]


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_every_token_but_the_first_is_predicted_once_in_order(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    tokens = list(range(count))
    for rows in (list(rolling_windows(tokens, length)), list(sliding_windows(tokens, length, stride))):
        assert predictions(rows) == tokens[1:]
        assert all(1 <= row.first_scored < len(row.tokens) <= length + 1 for row in rows)
        assert all(row.tokens == tokens[row.tokens[0]:row.tokens[-1] + 1] for row in rows)


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_sliding_windows_predict_from_all_the_context_promised(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    for row in list(sliding_windows(list(range(count)), length, stride))[1:]:
        assert row.first_scored == length - stride + 1


@given(st.integers(0, 60), st.integers(1, 20))
def test_a_stride_of_all_positions_predicts_what_disjoint_windows_do(count: int, length: int) -> None:
    tokens = list(range(count))
    whole = [(row.tokens, row.first_scored) for row in sliding_windows(tokens, length, length)]
    rolling = [(row.tokens, row.first_scored) for row in rolling_windows(tokens, length)]
    assert whole[:-1] == rolling[:-1]


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(ConfigError, match=f"--overlapping-eval = {stride}.*8 positions.*from 1 to 8"):
        list(sliding_windows([1, 2, 3], 8, stride))
