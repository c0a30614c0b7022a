"""From a context and a continuation as texts to the row of tokens that scores the continuation."""

from dataclasses import dataclass

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError
from megatron_ltd.eval.requests import ScoreRow


@dataclass(frozen=True)
class PairEncoder:
    """Encodes pairs as lm-evaluation-harness does.

    Context and continuation are encoded together and cut where the context's own encoding ends; spaces at the end of
    the context go to the continuation first. An empty context is the token `bos`, or that which ends documents. What is
    longer than the model's positions is cut on the left.
    """

    tokenizer: Tokenizer
    max_length: int
    bos: int | None = None

    def row(self, context: str, continuation: str, place: str) -> tuple[ScoreRow, bool]:
        """The row, and whether its context was cut.

        Raises:
            DataError: the continuation is no token, or more than the model has positions.
        """
        before, scored = self._tokens(context, continuation)
        if not before or not 1 <= len(scored) <= self.max_length:
            raise DataError(f"{place}: {continuation!r}"[:200] + f" is {len(scored)} tokens after a context of "
                            f"{len(before)}; it must be 1 to {self.max_length} (the model's positions) after at least "
                            "1. Remove the example, or check that the tokenizer is the model's.")
        tokens = (before + scored)[-(self.max_length + 1):]
        return ScoreRow(tokens, len(tokens) - len(scored)), len(tokens) < len(before) + len(scored)

    def _tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            first = self.tokenizer.eod if self.bos is None else self.bos
            scored = self.tokenizer.encode(continuation)
            return (scored[:1], scored[1:]) if scored[:1] == [first] else ([first], scored)
        bare = context.rstrip()
        whole, cut = self.tokenizer.encode(context + continuation), len(self.tokenizer.encode(bare))
        first_tokens = [] if self.bos is None else [self.bos]
        return first_tokens + whole[:cut], whole[cut:]
