"""What a task asks of a model, and what it gets back.

A task turns its examples into rows of tokens with the position from which they are scored; the scorer answers
with the log-probability of every scored token and whether it was the model's first choice. The scorer sorts,
batches and distributes rows as it likes: the answer to a row depends on that row alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DivergenceError

SLAB_ROWS = 256
"""Rows handed to the scorer at once: enough to sort by length, few enough for the progress bar to move."""


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


def stopped_by(stops: Sequence[str], tokenizer: Tokenizer) -> Finished:
    """Finished as soon as the text holds one of the stops."""
    return lambda tokens: any(stop in tokenizer.decode(tokens) for stop in stops)


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


class TokenScorer(Protocol):
    """A language model as the tasks see it."""

    @property
    def max_length(self) -> int:
        """Positions the model has."""

    def score(self, rows: list[ScoreRow]) -> list[ScoredRow]:
        """Answers in the order of the rows; on several processes all call it with the same rows."""

    def generate(self, texts: list[list[int]], new_tokens: int, eod: int, finished: Finished) -> list[list[int]]:
        """The most probable tokens after each text, as `Decoder.generate`; all processes call it alike."""


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


def score_by_length(scorer: TokenScorer, rows: list[ScoreRow], label: str, show_progress: bool) -> list[ScoredRow]:
    """`score_rows` with rows of similar length together over the whole task, not only within a slab: less padding."""
    order = by_length([row.tokens for row in rows])
    answers = score_rows(scorer, [rows[i] for i in order], label, show_progress)
    found = dict(zip(order, answers, strict=True))
    return [found[i] for i in range(len(rows))]


def by_length(texts: Sequence[Sequence[int]]) -> list[int]:
    """The places of the texts from the longest to the shortest."""
    return sorted(range(len(texts)), key=lambda i: -len(texts[i]))
