"""What a task asks of a model, and what it gets back.

A task turns its examples into rows of tokens with the position from which they are scored; the engine answers
with the log-probability of every scored token and whether it was the model's first choice. The engine sorts,
batches and distributes rows as it likes: the answer to a row depends on that row alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

from megatron_ltd.checkpoint.manifest import Manifest
from megatron_ltd.config import DataConfig
from megatron_ltd.errors import DivergenceError

SLAB_ROWS = 256
"""Rows handed to the engine at once: enough to sort by length, few enough for the progress bar to move."""


@dataclass(frozen=True)
class ScoreRow:
    """Score tokens[first_scored:], each given all tokens before it.

    Args:
        tokens: at most max_length + 1 of them, since the last one is only predicted.
        first_scored: at least 1.
    """

    tokens: list[int]
    first_scored: int


@dataclass(frozen=True)
class ScoredRow:
    """The answer to a `ScoreRow`.

    Shapes:
        logprobs [n_scored] fp32, natural logarithm
        greedy [n_scored] bool: the token is the argmax of its distribution
    """

    logprobs: np.ndarray
    greedy: np.ndarray

    @property
    def logprob(self) -> float:
        """Log-probability of all scored tokens together."""
        return float(self.logprobs.sum(dtype=np.float64))


Finished = Callable[[list[int]], bool]
"""Whether the tokens that were generated so far are enough."""


class TokenScorer(Protocol):
    """A language model as the tasks see it."""

    @property
    def max_length(self) -> int:
        """Positions the model has."""

    def score(self, rows: list[ScoreRow]) -> list[ScoredRow]:
        """Answers in the order of the rows; on several processes all call it with the same rows."""

    def generate(self, texts: list[list[int]], new_tokens: int, eod: int, finished: Finished) -> list[list[int]]:
        """The most probable tokens after each text, as `Decoder.generate`; all processes call it alike."""


class CheckpointScorer(TokenScorer, Protocol):
    """A scorer whose model was built from a checkpoint's manifest."""

    @property
    def manifest(self) -> Manifest:
        """What was loaded."""

    @property
    def tokenizer_config(self) -> DataConfig:
        """The tokenizer settings of the run that wrote it."""


def score_rows(scorer: TokenScorer, rows: list[ScoreRow], label: str, show_progress: bool) -> list[ScoredRow]:
    """Score all rows of a task with a progress bar.

    Raises:
        DivergenceError: a log-probability is NaN.
    """
    answers: list[ScoredRow] = []
    with tqdm(total=len(rows), desc=label, unit="row", disable=not show_progress) as bar:
        for start in range(0, len(rows), SLAB_ROWS):
            slab = rows[start:start + SLAB_ROWS]
            answers += scorer.score(slab)
            bar.update(len(slab))
    bad = sum(bool(np.isnan(answer.logprobs).any()) for answer in answers)
    if bad:
        raise DivergenceError(
            f"{label}: {bad} of {len(rows)} rows have NaN log-probabilities, so the model gives no score. "
            "Its weights or activations are not finite: evaluate an earlier checkpoint, or in fp32."
        )
    return answers
