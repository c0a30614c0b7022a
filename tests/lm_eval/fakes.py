"""A tokenizer and a scorer whose answers can be worked out by hand."""

import math
from collections.abc import Sequence

import numpy as np

from megatron_ltd.lm_eval.requests import ScoredRow, ScoreRow


class WordTokenizer:
    """One token a word, a space belonging to the word after it; ids in order of first use, 0 ends a document."""

    def __init__(self) -> None:
        self.vocab_size = 1000
        self.eod = 0
        self.bos: int | None = None
        self.adds_bos = False
        self.remark: str | None = None
        self.pad: int | None = None
        self.digest = "words"
        self.files: tuple[str, ...] = ()
        self.ids: dict[str, int] = {}

    def token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def encode(self, text: str) -> list[int]:
        pieces = [piece if index == 0 else " " + piece for index, piece in enumerate(text.split(" "))]
        return [self.ids.setdefault(piece, len(self.ids) + 1) for piece in pieces if piece]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        words = {number: word for word, number in self.ids.items()}
        return "".join(words[token] for token in ids)


class UniformScorer:
    """Every token has probability 1 / vocab; `knows` are the tokens it would have chosen. Keeps what it was asked."""

    def __init__(self, max_length: int = 1000, vocab: int = 8, knows: frozenset[int] = frozenset()):
        self.max_length = max_length
        self.vocab = vocab
        self.knows = knows
        self.rows: list[ScoreRow] = []

    def score(self, rows: list[ScoreRow]) -> list[ScoredRow]:
        self.rows += rows
        return [self._answer(row.tokens[row.first_scored:]) for row in rows]

    def _answer(self, targets: list[int]) -> ScoredRow:
        logprobs = np.full(len(targets), -math.log(self.vocab), dtype=np.float32)
        return ScoredRow(logprobs, np.array([token in self.knows for token in targets]))
