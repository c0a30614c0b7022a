"""From texts to the rows of tokens that a model scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.lm_eval.requests import ScoreRow


class Encoded(NamedTuple):
    """A context and its continuation as a row.

    Args:
        cut: the row was longer than the model's positions and is its end.
        apart: a token spans the end of the context, so the two were encoded apart.
    """

    row: ScoreRow
    cut: bool
    apart: bool


@dataclass(frozen=True)
class RowEncoder:
    """Encodes texts as lm-evaluation-harness does.

    Args:
        max_length: positions the model has.
        bos: token with which every text begins, for models trained that way.
        overlong: as in `EvalOptions`; examples to skip are encoded all the same, for the caller to leave out.
    """

    tokenizer: Tokenizer
    max_length: int
    bos: int | None = None
    overlong: str = "truncate"

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text to be continued; one that begins with `bos`, as a chat template may, gets no second."""
        tokens = self.tokenizer.encode(text)
        return tokens if self.bos is None or tokens[:1] == [self.bos] else [self.bos, *tokens]

    def open_prompt(self, text: str, new_tokens: int, place: str) -> Encoded:
        """The tokens of a text that leaves room for an answer, the end of it if it is longer.

        Raises:
            DataError: it is too long and that is an error.
        """
        whole, room = self.prompt(text) or [self._first()], self.max_length - new_tokens
        if len(whole) > room and self.overlong == "error":
            raise self._too_long(place, len(whole) + new_tokens)
        return Encoded(ScoreRow(whole[-room:], 1), len(whole) > room, False)

    def pair(self, context: str, continuation: str, place: str) -> Encoded:
        """The row that scores a continuation.

        The continuation is what comes after as many tokens as the context has when both are encoded together, even if
        the first of these tokens are others than the context's own; spaces at the end of the context belong to the
        continuation. Where that leaves the continuation no token, they are encoded apart. A context without text is
        the token `bos`, else the end-of-document token. Of a row longer than the model's positions the end is scored.

        Raises:
            DataError: the continuation has no token, or the row is too long and that is an error.
        """
        apart = False
        if context.strip():
            text = context.rstrip()
            before = self.prompt(text)
            scored = self.prompt(context + continuation)[len(before):]
            if not scored:
                apart, scored = True, self.tokenizer.encode(context[len(text):] + continuation)
        else:
            before, scored = [self._first()], self.tokenizer.encode(context + continuation)
            if scored[:1] == before and len(scored) > 1:
                scored = scored[1:]
        if not scored or not before:
            raise DataError(f"{place}: {continuation!r}"[:200] + f" is {len(scored)} tokens after a context of "
                            f"{len(before)}; there must be at least 1 of each. Remove the example, or check that the "
                            "tokenizer is the model's.")
        tokens = (before + scored)[-(self.max_length + 1):]
        cut = len(tokens) < len(before) + len(scored)
        if cut and self.overlong == "error":
            raise self._too_long(place, len(before) + len(scored))
        return Encoded(ScoreRow(tokens, max(1, len(tokens) - len(scored))), cut, apart)

    def _too_long(self, place: str, tokens: int) -> DataError:
        return DataError(f"{place} takes {tokens} tokens, and the model has {self.max_length} positions. Remove the "
                         "example, or use --overlong truncate or skip.")

    def fits(self, encoded: Sequence[Sequence[Encoded]], what: str) -> list[bool]:
        """Which examples are scored: all of them, unless those with a row that was cut are to be skipped.

        Raises:
            DataError: none is left.
        """
        kept = [self.overlong != "skip" or not any(one.cut for one in rows) for rows in encoded]
        if not any(kept):
            raise DataError(f"{what}: all examples are longer than the model's {self.max_length} positions. Use "
                            "--overlong truncate to score their last tokens.")
        return kept

    def notes(self, encoded: Sequence[Sequence[Encoded]]) -> tuple[str, ...]:
        """What is to be told of examples that were encoded."""
        skipped = sum(any(one.cut for one in rows) for rows in encoded) if self.overlong == "skip" else 0
        return notes_on_examples(skipped, sum(any(one.apart for one in rows) for rows in encoded))

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


def notes_on_examples(skipped: int, apart: int) -> tuple[str, ...]:
    """What is to be told of examples that were skipped, or whose context and continuation were encoded apart."""
    notes = [(skipped, "longer than the model's positions, left out"),
             (apart, "with a token that spans the end of the context, which was encoded apart")]
    return tuple(f"{count} examples {what}" for count, what in notes if count)


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
