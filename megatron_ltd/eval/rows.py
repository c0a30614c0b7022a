"""From texts to the rows of tokens that a model scores."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.eval.requests import ScoreRow


@dataclass(frozen=True)
class RowEncoder:
    """Encodes texts as lm-evaluation-harness does.

    Args:
        max_length: positions the model has.
        bos: token with which every text begins, for models trained that way.
    """

    tokenizer: Tokenizer
    max_length: int
    bos: int | None = None

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text to be continued."""
        return ([] if self.bos is None else [self.bos]) + self.tokenizer.encode(text)

    def pair(self, context: str, continuation: str, place: str) -> tuple[ScoreRow, bool]:
        """The row that scores a continuation, and whether its context was cut.

        Both are encoded together and split where the context's own encoding ends; spaces at the end of the context
        belong to the continuation. An empty context is the token `bos`, else the end-of-document token. Rows longer
        than the model's positions are cut on the left.

        Raises:
            DataError: the continuation has no token, or more tokens than the model has positions.
        """
        if context:
            whole, cut = self.prompt(context + continuation), len(self.prompt(context.rstrip()))
            before, scored = whole[:cut], whole[cut:]
        else:
            before, scored = [self._first()], self.tokenizer.encode(continuation)
            if scored[:1] == before:
                scored = scored[1:]
        if not before or not 1 <= len(scored) <= self.max_length:
            raise DataError(f"{place}: {continuation!r}"[:200] + f" is {len(scored)} tokens after a context of "
                            f"{len(before)}; it must be 1 to {self.max_length} (the model's positions) after at least "
                            "1. Remove the example, or check that the tokenizer is the model's.")
        tokens = (before + scored)[-(self.max_length + 1):]
        return ScoreRow(tokens, len(tokens) - len(scored)), len(tokens) < len(before) + len(scored)

    def windows(self, text: list[int], stride: int | None = None) -> Iterator[ScoreRow]:
        """Rows that predict each token of a text once, the first from `bos` or the end-of-document token.

        Args:
            stride: of sliding windows; None for rolling ones.
        """
        tokens = [self._first(), *text]
        return (rolling_windows(tokens, self.max_length) if stride is None
                else sliding_windows(tokens, self.max_length, stride))

    def _first(self) -> int:
        return self.tokenizer.eod if self.bos is None else self.bos


# Two ways to cut tokens that are more than the model's positions into rows. `tokens[0]` is context only. For 9
# predicted tokens and 4 positions, with c for context and p for predicted:
#
#     rolling   | c p p p p           |      sliding, stride 2   | c p p p p           |
#               |         c p p p p   |                          |     c c c p p       |
#               |           c c c c p |                          |         c c c p p   |
#                                                                |             c c c p |


def rolling_windows(tokens: list[int], max_length: int) -> Iterator[ScoreRow]:
    """Windows that share one token; the last one is moved back to be full, and predicts only what is left.

    The windows of lm-evaluation-harness's `loglikelihood_rolling`.
    """
    predicted_up_to = 1
    while predicted_up_to < len(tokens):
        end = min(predicted_up_to + max_length, len(tokens))
        start = max(0, end - max_length - 1)
        yield ScoreRow(tokens[start:end], first_scored=predicted_up_to - start)
        predicted_up_to = end


def sliding_windows(tokens: list[int], max_length: int, stride: int) -> Iterator[ScoreRow]:
    """Windows that start `stride` tokens apart; each after the first predicts its last `stride` positions.

    The windows of Megatron-LM's `--overlapping-eval`: a token is predicted from at least max_length - stride
    + 1 others, at max_length / stride times the cost of disjoint windows.

    Raises:
        ConfigError: the stride is not from 1 to max_length.
    """
    if not 1 <= stride <= max_length:
        raise ConfigError(
            f"--overlapping-eval = {stride} does not fit the model's {max_length} positions: windows would leave "
            f"tokens out. Choose a stride from 1 to {max_length}."
        )
    predicted_up_to, start = 1, 0
    while predicted_up_to < len(tokens):
        end = min(start + max_length + 1, len(tokens))
        yield ScoreRow(tokens[start:end], first_scored=predicted_up_to - start)
        predicted_up_to, start = end, start + stride
