"""ALiBi (https://arxiv.org/abs/2108.12409): instead of position embeddings, a bias on attention scores that falls with
the distance between query and key, with a slope of its own for each head."""

import torch

from megatron_ltd.parallel.collectives import TensorParallel


def slopes(heads: int) -> list[float]:
    """The slope of each head: 2^(-8 i / n) for n heads, i from 1, where n is a power of two. Otherwise those of the
    next lower power, followed by every other one of the next higher power, as in BLOOM."""
    lower = 1 << (heads.bit_length() - 1)
    plain = [2.0 ** (-8.0 * number / lower) for number in range(1, lower + 1)]
    return plain + [2.0 ** (-4.0 * number / lower) for number in range(1, 2 * (heads - lower), 2)]


def local_slopes(heads: int, tp: TensorParallel) -> list[float]:
    """The slopes of this process's heads."""
    first, count = tp.shard_span(heads)
    return slopes(heads)[first:first + count]


def biased(mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, of_heads: list[float]) -> torch.Tensor:
    """A mask as what is added to the scores: minus infinity where attention is not allowed, the bias elsewhere.

    Args:
        queries, keys: positions in the sample.
        of_heads: the slopes of this process's heads.

    Shapes:
        mask [b or 1, 1, k, c] bool, queries [b or 1, k], keys [b or 1, c] -> [b or 1, n/t, k, c] fp32
    """
    slope = torch.tensor(of_heads, device=mask.device)[:, None, None]
    distance = (queries[:, None, :, None] - keys[:, None, None, :]).float()
    return (distance * -slope).masked_fill(~mask, float("-inf"))
