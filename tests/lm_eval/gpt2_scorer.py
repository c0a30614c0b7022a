"""A tiny transformers GPT-2 behind the scorer's interface, one row at a time: slow, plain and independent."""

from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_ltd.data.text.tokenizer import Tokenizer, gpt2_bpe_tokenizer
from megatron_ltd.lm_eval.requests import ScoredRow, ScoreRow

EOD = 50256


def tiny_gpt2(positions: int = 64, vocab_size: int = 50257) -> GPT2LMHeadModel:
    """GPT-2 with weights that are the same bits under any version of torch: numpy's legacy generator, by name order."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=32, n_layer=2, n_head=2, bos_token_id=EOD, eos_token_id=EOD
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for index, (name, weight) in enumerate(sorted(model.named_parameters())):
            if weight.ndim == 2:
                draw = np.random.RandomState(index).standard_normal(tuple(weight.shape))
                weight.copy_(torch.from_numpy(0.3 * draw))
            else:
                weight.fill_(float("ln" in name and name.endswith("weight")))
    return model


def gpt2_tokenizer(shared_data: Path) -> Tokenizer:
    folder = shared_data / "tokenizers" / "gpt2"
    return gpt2_bpe_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


class Gpt2Scorer:
    """Scores rows with a transformers model."""

    def __init__(self, model: GPT2LMHeadModel):
        self.model = model
        self.max_length: int = model.config.n_positions
        self.rows: list[ScoreRow] = []

    def score(self, rows: list[ScoreRow]) -> list[ScoredRow]:
        self.rows += rows
        return [self._score_one(row) for row in rows]

    @torch.no_grad()
    def _score_one(self, row: ScoreRow) -> ScoredRow:
        assert 1 <= row.first_scored < len(row.tokens) <= self.max_length + 1
        logits = self.model(torch.tensor([row.tokens[:-1]])).logits[0, row.first_scored - 1:].double()
        target = torch.tensor(row.tokens[row.first_scored:])
        logprobs = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
        return ScoredRow(logprobs.float().numpy(), (logits.argmax(-1) == target).numpy())
