"""Scores of evaluation: log-probabilities against `log_softmax`, and the most probable token with ties."""

import pytest
import torch

from megatron_ltd.parallel import logit_chunks
from megatron_ltd.parallel.cross_entropy import VocabShard, token_log_probabilities
from tests.gloo import run_ranks
from tests.parallel.sharded import noise, tensor_parallel

TOKENS, WIDTH = 70, 12
SIZES = [(64, 64), (61, 64), (17, 32), (5, 64)]
"""Vocabulary and rows; some ranks hold only padding."""


def inputs(vocab_size: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small whole numbers, so that products are exact and equal rows tie; every third row repeats the one before."""
    hidden = noise(TOKENS, WIDTH, seed=1).mul(2).round().float()
    table = noise(rows, WIDTH, seed=2).mul(2).round().float()
    table[2::3] = table[1::3][:len(table[2::3])]
    table[vocab_size - 1] = table[0]  # the first and the last rank tie
    table[vocab_size:] = 100.0  # padding would win if it took part
    hidden[:4] = table[0]
    best = (hidden @ table[:vocab_size].T).argmax(1)
    labels = torch.randint(0, vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(4))
    labels[::2] = best[::2]
    labels[1] = vocab_size - 1
    return hidden, table, labels


def on_ranks(rank: int, ranks: int, chunk: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tp = tensor_parallel(ranks)
    logit_chunks._CHUNK_LOGITS["cpu"] = chunk
    logit_chunks._LEAST_CHUNK_TOKENS = 16
    results = []
    for vocab_size, rows in SIZES:
        hidden, table, labels = inputs(vocab_size, rows)
        shard = VocabShard.of(rows, vocab_size, tp)
        results.append(token_log_probabilities(hidden, table[shard.first:shard.first + shard.rows], labels, shard))
    return results


@pytest.mark.parametrize(("ranks", "chunk"), [(1, 1 << 22), (1, 1), (2, 1), (4, 1 << 22), (4, 1)])
def test_scores_are_those_of_the_full_logits(ranks: int, chunk: int) -> None:
    for results in run_ranks(on_ranks, ranks, chunk):
        for (vocab_size, rows), (log_probabilities, greedy) in zip(SIZES, results, strict=True):
            hidden, table, labels = inputs(vocab_size, rows)
            logits = (hidden @ table[:vocab_size].T).double()
            expected = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
            torch.testing.assert_close(log_probabilities.double(), expected, rtol=1e-6, atol=2e-6)
            ties = (logits == logits.amax(1, keepdim=True)).sum(1)
            lowest = [int((row == row.max()).nonzero()[0]) for row in logits]
            assert greedy.tolist() == [low == int(label) for low, label in zip(lowest, labels, strict=True)]
            assert int((ties > 1).sum()) >= 5, "the case has ties"
            assert bool(greedy[::2].all()) and not bool(greedy.all())
            tied_but_higher = (logits.gather(1, labels[:, None])[:, 0] == logits.amax(1)) & ~greedy
            assert bool(tied_but_higher.any()), "a label that ties with a lower id is not the most probable one"
