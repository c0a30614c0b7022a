"""Attention whose probabilities are dropped out.

Fused kernels draw masks of their own, which differ between layouts, and a score of minus infinity would change the
softmax's denominator as well. So scores are formed, but only those of a few samples and heads at a time: a part keeps
its queries, keys and values, and its backward pass computes its scores again.
"""

from collections.abc import Sequence
from functools import partial

import torch

from megatron_ltd.model.dropout import keep_mask
from megatron_ltd.model.recompute import recomputed

_SCORES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}
"""On a CPU few enough to stay close to the cache, on a GPU enough to fill it."""


def attend_with_dropout(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
                        dropout_keys: tuple[torch.Tensor, torch.Tensor], probability: float, *, causal: bool,
                        first_head: int, most_tokens: int) -> torch.Tensor:
    """dropout(softmax(q k^T / sqrt(d))) v for every head.

    Args:
        mask, dropout_keys, causal: see `TokenContext`.
        first_head: global number of the first head.
        most_tokens: queries that a layer can have, from which compiled layers size the parts: they have one graph for
            all numbers of queries.

    Shapes:
        query [b, n/t, k, d], key and value [b, n/t, c, d] -> [b, n/t, k, d]
    """
    samples, heads, length, _ = query.shape
    tokens = most_tokens if torch.compiler.is_compiling() else length
    at_once = max(1, _SCORES_AT_ONCE.get(query.device.type, 1 << 24) // (tokens * tokens))
    if mask is None and causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    head_keys = (torch.arange(heads, dtype=torch.int32, device=query.device) + first_head) * 0x2545F491
    of_queries, of_keys = dropout_keys
    operands = query, key, value, mask, of_queries + head_keys[:, None, None], of_keys
    core = partial(_attend, probability=probability)
    parts = [torch.cat([recomputed(True, core, *part) for part in _parts(some, 1, at_once)], dim=1)
             for some in _parts(operands, 0, max(1, at_once // heads))]
    return torch.cat(parts)


def _parts(operands: Sequence[torch.Tensor | None], dim: int, size: int) -> list[tuple[torch.Tensor | None, ...]]:
    """The operands of each part along a dim, which the first one has; others may be broadcast over it."""
    assert operands[0] is not None
    whole = operands[0].shape[dim]
    count = -(-whole // size)
    split = [[operand] * count if operand is None or operand.shape[dim] < whole else operand.split(size, dim)
             for operand in operands]
    return list(zip(*split, strict=True))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
            of_queries: torch.Tensor, of_keys: torch.Tensor, *, probability: float) -> torch.Tensor:
    scores = (query @ key.mT).float() * query.shape[-1]**-0.5
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
    keep = keep_mask(of_queries, of_keys, probability)
    return (scores.softmax(dim=-1) * keep * (1.0 / (1.0 - probability))).to(value.dtype) @ value
