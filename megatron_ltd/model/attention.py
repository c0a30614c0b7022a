"""Causal self-attention with grouped queries, on whatever tokens it is given."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ltd.config import ModelConfig
from megatron_ltd.model.dropout import keep_mask
from megatron_ltd.model.rotary import rotate
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True)
class TokenFacts:
    """What a layer must know of the tokens it processes, besides their hidden states. Tokens are in sequence order.

    Shapes:
        cos, sin: rotary angles [k, b or 1, 1, r / 2], None without rotary positions
        mask: attention allowed, [b, 1, k, k] bool; None is plain causal attention
        hidden_keys: dropout keys of the tokens this process holds between regions, two of [k/t or k, b] int32;
            None without dropout
        attention_keys: dropout keys of the queries [b, 1, k, 1] and places of the keys [b or 1, 1, 1, k], int32;
            None without dropout
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    hidden_keys: tuple[torch.Tensor, torch.Tensor] | None = None
    attention_keys: tuple[torch.Tensor, torch.Tensor] | None = None


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v for every head, projected back to the residual stream.

    The rows of the query/key/value weight are grouped by key/value head, [g, (n/g + 2), d], so that a shard holds
    whole groups.

    Args:
        recompute: compute the attention core again in the backward pass rather than keep its result.

    Shapes:
        x [k/t or k, b, h] -> the same
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, recompute: bool = False):
        super().__init__()
        self.tp = tp
        self.head_dim = config.head_dim
        self.groups_local = config.query_groups // tp.size
        self.queries_per_group = config.num_attention_heads // config.query_groups
        self.first_head, _ = tp.shard_span(config.num_attention_heads)
        self.dropout = config.attention_dropout
        self.recompute = recompute
        qkv_features = (config.num_attention_heads + 2 * config.query_groups) * config.head_dim
        bias = not config.disable_bias_linear
        self.qkv = ColumnParallelLinear(config.hidden_size, qkv_features, tp, bias=bias or config.add_qkv_bias)
        self.proj = RowParallelLinear(config.num_attention_heads * config.head_dim, config.hidden_size, tp, bias=bias)

    def forward(self, x: torch.Tensor, facts: TokenFacts) -> torch.Tensor:
        x = self.tp.enter(x)
        qkv = self.qkv(x).unflatten(-1, (self.groups_local, self.queries_per_group + 2, self.head_dim))
        query, key, value = qkv.split((self.queries_per_group, 1, 1), dim=3)
        query, key, value = query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)  # [k, b, n/t or g/t, d]
        if facts.cos is not None and facts.sin is not None:
            query, key = rotate(query, facts.cos, facts.sin), rotate(key, facts.cos, facts.sin)
        if self.queries_per_group > 1:
            key = key.repeat_interleave(self.queries_per_group, dim=2)
            value = value.repeat_interleave(self.queries_per_group, dim=2)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, n/t, k, d]
        if self.recompute and self.training:
            context = checkpoint(self._core, query, key, value, facts, use_reentrant=False, preserve_rng_state=False)
        else:
            context = self._core(query, key, value, facts)
        return self.proj(context.permute(2, 0, 1, 3).flatten(2))

    def _core(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, facts: TokenFacts) -> torch.Tensor:
        if facts.attention_keys is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=facts.mask, is_causal=facts.mask is None)
        return self._core_with_dropout(query, key, value, facts, facts.attention_keys)

    def _core_with_dropout(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, facts: TokenFacts,
                           dropout_keys: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Attention spelled out: the fused kernels cannot draw a mask that is the same on every layout."""
        length, heads_local = query.shape[2], query.shape[1]
        mask = facts.mask
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        scores = (query @ key.mT).float() * self.head_dim**-0.5
        probabilities = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        heads = torch.arange(heads_local, dtype=torch.int32, device=query.device)[:, None, None] + self.first_head
        keep = keep_mask(dropout_keys[0] + heads * 0x2545F491, dropout_keys[1], self.dropout)
        return (probabilities * keep * (1.0 / (1.0 - self.dropout))).to(value.dtype) @ value
