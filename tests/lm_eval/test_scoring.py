"""What holds for every task: statistics, slabs of rows, and scores that are not numbers."""

import math
import statistics

import numpy as np
import pytest

from megatron_ltd.errors import DivergenceError
from megatron_ltd.lm_eval.requests import SLAB_ROWS, ScoredRow, ScoreRow, score_rows
from megatron_ltd.lm_eval.results import bits_per, mean_and_stderr, perplexity
from tests.lm_eval.fakes import UniformScorer


def test_the_standard_error_is_the_sample_deviation_over_root_n() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    metric = mean_and_stderr(values)
    assert metric.value == pytest.approx(statistics.mean(values))
    assert metric.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean_and_stderr([0.5]).stderr is None


def test_a_perplexity_beyond_floating_point_is_infinite() -> None:
    assert perplexity(1e6, 1) == math.inf
    assert perplexity(math.log(7) * 3, 3) == pytest.approx(7)
    assert bits_per(math.log(2) * 6, 3) == pytest.approx(2)


def test_rows_come_back_in_order_across_slabs() -> None:
    rows = [ScoreRow([0] * (2 + index % 5), 1) for index in range(2 * SLAB_ROWS + 7)]
    answers = score_rows(UniformScorer(), rows, "task", show_progress=False)
    assert [len(answer.logprobs) for answer in answers] == [len(row.tokens) - 1 for row in rows]


def test_nan_scores_are_an_error_and_not_a_number_in_a_table() -> None:
    class BrokenScorer(UniformScorer):
        def score(self, rows: list[ScoreRow]) -> list[ScoredRow]:
            return [ScoredRow(np.array([-1.0, np.nan], np.float32), np.array([True, True])) for _ in rows]

    with pytest.raises(DivergenceError, match="lambada: 3 of 3 rows have NaN"):
        score_rows(BrokenScorer(), [ScoreRow([1, 2, 3], 1)] * 3, "lambada", show_progress=False)
