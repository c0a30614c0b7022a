"""Self-attention with grouped queries, rotary positions, sliding windows and convolutions, on any subset of the
tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.attention.convolution import Convolution, Reading, convolved
from megatron_ltd.model.attention.documents import Documents, attend_in_documents
from megatron_ltd.model.attention.dropout import attend_with_dropout
from megatron_ltd.model.attention.rotary import rotate
from megatron_ltd.model.norm import build_query_key_norm
from megatron_ltd.model.projection import project
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.entrance import Linear
from megatron_ltd.parallel.layers import ColumnParallelLinear, RowParallelLinear, local


class KeyValueCache:
    """Preallocated keys and values of a layer, and the newest rows that a convolution read.

    Args:
        capacity: maximum number of tokens in each text.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._read: dict[str, torch.Tensor] = {}

    def after_earlier(self, name: str, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Rows of new tokens after those of the `count` tokens before them, which are zero before the first token.

        Args:
            name: of what the rows are.

        Shapes:
            [s, b, o] -> [count + s, b, o]
        """
        earlier = self._read.get(name, rows.new_zeros(count, *rows.shape[1:]))
        rows = torch.cat((earlier, rows))
        self._read[name] = rows[len(rows) - count:]
        return rows

    def extend(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens and return those of all tokens.

        Shapes:
            key and value [s, b, g, d] -> twice [all, b, g, d]
        """
        if self._room is None:
            shape = (self.capacity, *key.shape[1:])
            self._room = key.new_empty(shape), value.new_empty(shape)
        start, self.length = self.length, self.length + key.shape[0]
        for room, newest in zip(self._room, (key, value), strict=True):
            room[start:self.length] = newest
        keys, values = (room[:self.length] for room in self._room)
        return keys, values


@dataclass(frozen=True)
class TokenContext:
    """What a layer needs to know about the tokens it processes, besides their hidden states. Tokens are in sequence
    order. The keys come from the tokens themselves, c = k; in a cross layer they come from all tokens of the sample, c
    = s.

    Args:
        causal: a token attends to itself and to earlier ones; only used without a mask.
        documents: within which the tokens attend, to earlier ones or to all; None: as the mask says.
        cache: keys and values of earlier tokens, to which those of these tokens are appended; the mask then has a
            column for each, and `reading` is that of the rows of earlier tokens too.
        reading: the earlier tokens that a convolution reads; None: all of the sample. That of the keys of a cross layer
            is key_reading.

    Shapes:
        angles: rotary cosines and sines of the tokens, two of [k, b or 1, 1, r / 2], None without rotary positions
        key_angles: of the keys of a cross layer, two of [s, b or 1, 1, r / 2]; None elsewhere
        mask: attention allowed, [b, 1, k or 1, c] bool, or what is added to the scores, [b or 1, 1 or n/t, k, c]; None
            allows all that `causal` does
        window_mask: the mask of layers with a sliding window; None where the window reaches everything
        hidden_keys: dropout keys of the tokens this process holds between regions, two of [k/t or k, b] int32;
            None without dropout
        attention_keys: dropout keys of the queries [b, 1, k, 1] and positions of the keys [b or 1, 1, 1, c], int32;
            None without dropout
    """

    causal: bool = True
    angles: tuple[torch.Tensor, torch.Tensor] | None = None
    key_angles: tuple[torch.Tensor, torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    window_mask: torch.Tensor | None = None
    hidden_keys: tuple[torch.Tensor, torch.Tensor] | None = None
    attention_keys: tuple[torch.Tensor, torch.Tensor] | None = None
    documents: Documents | None = None
    cache: KeyValueCache | None = None
    reading: Reading | None = None
    key_reading: Reading | None = None

    def for_layer(self, config: ModelConfig, layer: int) -> "TokenContext":
        """The same for a layer that may have a window, or no rotation."""
        context = self
        if config.is_windowed(layer) and self.window_mask is not None:
            context = replace(context, mask=self.window_mask)
        return context if config.is_rotated(layer) else replace(context, angles=None, key_angles=None)

    def seeing_only(self, chosen: torch.Tensor) -> "TokenContext":
        """The same, but besides itself a token sees only the chosen ones. The tokens are the last of those they see.

        Shapes:
            chosen [b, c] bool
        """
        keys = torch.arange(chosen.shape[1], device=chosen.device)
        queries = (keys if self.mask is None else keys[-self.mask.shape[2]:])[:, None]  # [k, 1]
        mask, seen = self.mask, chosen[:, None, None] | (keys == queries)
        reading = self.reading and tuple(earlier.seeing_only(chosen) for earlier in self.reading)
        if mask is not None and mask.is_floating_point():
            return replace(self, mask=mask.masked_fill(~seen, float("-inf")), reading=reading)
        return replace(self, mask=seen & (keys <= queries if mask is None else mask), reading=reading)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v for every head, projected back to the residual stream.

    The rows of the query/key/value weight are grouped by key/value head, [g, (n/g + 2), d], so that a shard holds
    whole groups. With more processes than groups, t/g processes share a group: each takes n/t of its queries, and a
    copy of its key and value, out of the gathered weight, whose gradient is summed over the copies.

    Args:
        recompute: recompute the normalised inputs in the backward pass instead of storing them.

    Shapes:
        x [k/t or k, b, h]; context, whose keys and values a cross layer takes, [s/t or s, b, h] -> like x
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, recompute: bool = False):
        super().__init__()
        self.tp = tp
        self.head_dim = config.head_dim
        self.shares_groups = config.query_groups < tp.size
        self.groups = config.query_groups
        self.groups_local = max(1, config.query_groups // tp.size)
        self.queries_per_group = config.num_attention_heads // max(config.query_groups, tp.size)  # of this process
        self.first_head, _ = tp.shard_span(config.num_attention_heads)
        self.dropout, self.most_tokens = config.attention_dropout, config.seq_length
        self.recompute = recompute
        qkv_features = (config.num_attention_heads + 2 * config.query_groups) * config.head_dim
        self.qkv = ColumnParallelLinear(config.hidden_size, qkv_features, tp, bias=config.qkv_bias)
        kernel = config.qkv_conv_kernel
        self.conv = None if kernel is None else Convolution(qkv_features, kernel, tp)
        self.proj = RowParallelLinear(config.num_attention_heads * config.head_dim, config.hidden_size, tp,
                                      bias=config.proj_bias)
        self.query_norm = build_query_key_norm(config, config.num_attention_heads, tp)
        self.key_norm = build_query_key_norm(config, config.query_groups, tp)

    def forward(self, x: torch.Tensor, tokens: TokenContext, context: torch.Tensor | None = None,
                norm: nn.Module | None = None) -> torch.Tensor:
        """Args:
            norm: is applied to x and to the context first.
        """
        recompute = self.recompute and self.training
        query, key, value = self._project(norm, x, tokens, context, recompute)
        query, key, value = query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)  # [k or c, b, n/t or g/t, d]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if tokens.angles is not None:
            query, key = rotate(query, *tokens.angles), rotate(key, *(tokens.key_angles or tokens.angles))
        if tokens.cache is not None:
            key, value = tokens.cache.extend(key, value)
        # Kernels that take a mask or documents do not all take grouped queries, nor does a GPU's for fp32; torch would
        # use its slowest one, which keeps all scores.
        takes_groups = (tokens.mask is None and tokens.attention_keys is None and tokens.documents is None
                        and not (query.is_cuda and query.dtype is torch.float32))
        if self.queries_per_group > 1 and not takes_groups:
            key = key.repeat_interleave(self.queries_per_group, dim=2)
            value = value.repeat_interleave(self.queries_per_group, dim=2)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, n/t, k or c, d]
        mixed = self._core(query, key, value, tokens)
        return self.proj(mixed.permute(2, 0, 1, 3).flatten(2))

    def _project(self, norm: nn.Module | None, x: torch.Tensor, tokens: TokenContext, context: torch.Tensor | None,
                 recompute: bool) -> tuple[torch.Tensor, ...]:
        """Queries of x, and keys and values of x or of the context. Shapes: [k or c, b, g/t, n/g or 1, d]"""
        of_queries, of_keys = slice(None, self.queries_per_group), slice(self.queries_per_group, None)
        if context is None and not self.shares_groups:
            (qkv,) = project(x, [self.qkv.linear], self.tp, norm, recompute)
            qkv = self._convolved(qkv, slice(None), tokens.reading, tokens.cache)
            qkv = qkv.unflatten(-1, (self.groups_local, self.queries_per_group + 2, self.head_dim))
            return qkv.split((self.queries_per_group, 1, 1), dim=3)
        queries, keys_and_values = self._linears(of_queries, of_keys)
        if context is None:
            found = project(x, [queries, keys_and_values], self.tp, norm, recompute)
        else:
            found = (*project(x, [queries], self.tp, norm, recompute),
                     *project(context, [keys_and_values], self.tp, norm, recompute))
        readings = tokens.reading, tokens.reading if context is None else tokens.key_reading
        query, key_value = (
            self._convolved(part, chosen, reading, tokens.cache).unflatten(-1, (self.groups_local, -1, self.head_dim))
            for part, chosen, reading in zip(found, (of_queries, of_keys), readings, strict=True))
        return query, *key_value.split((1, 1), dim=3)

    def _rows(self, parameter: torch.Tensor) -> torch.Tensor:
        """This process's rows of the query/key/value weight or bias. Shapes: -> [g/t, (n/g + 2), d, ...]"""
        if not self.shares_groups:
            return local(parameter).unflatten(0, (self.groups_local, self.queries_per_group + 2, self.head_dim))
        sharing = self.tp.size // self.groups
        group, place = divmod(self.first_head // self.queries_per_group, sharing)
        heads = self.tp.gather_shards(local(parameter)).unflatten(0, (self.groups, -1, self.head_dim))[group]
        queries = heads[:-2].chunk(sharing)[place]
        return torch.cat((queries, heads[-2:]))[None]

    def _linears(self, *parts: slice) -> Iterator[Linear]:
        """That of the queries, and that of keys and values, for when each reads tokens of its own or has rows of its
        own.

        Args:
            parts: the heads of a group that each has.
        """
        weight = self._rows(self.qkv.weight)
        bias = None if self.qkv.bias is None else self._rows(self.qkv.bias)
        for chosen in parts:
            yield weight[:, chosen].flatten(0, 2), None if bias is None else bias[:, chosen].flatten()

    def _convolved(self, rows: torch.Tensor, chosen: slice, reading: Reading | None,
                   cache: KeyValueCache | None) -> torch.Tensor:
        """The rows that were projected, with those of earlier tokens, if the model has such a convolution.

        Args:
            chosen: the heads of a group whose rows these are.

        Shapes:
            [k, b, o/t] -> the same
        """
        if self.conv is None:
            return rows
        weight = self._rows(self.conv.weight)[:, chosen].flatten(0, 2)
        if cache is None:
            return convolved(rows, weight, reading)
        return convolved(cache.after_earlier(str(chosen), rows, weight.shape[1]), weight, reading)[weight.shape[1]:]

    def _core(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: TokenContext) -> torch.Tensor:
        mask = tokens.mask
        if tokens.documents is not None:
            return attend_in_documents(query, key, value, tokens.documents)
        if tokens.attention_keys is not None:
            return attend_with_dropout(query, key, value, mask, tokens.attention_keys, self.dropout,
                                       causal=tokens.causal, first_head=self.first_head, most_tokens=self.most_tokens)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask,
                                              is_causal=tokens.causal and mask is None,
                                              enable_gqa=query.shape[1] != key.shape[1])
