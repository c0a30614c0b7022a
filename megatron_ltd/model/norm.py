"""LayerNorm and RMSNorm of the hidden state, and those of queries and keys. With --apply-layernorm-1p their weight is
the distance from 1 of the factor."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import local, sharded_parameter


def _factor(weight: torch.Tensor, one_plus: bool) -> torch.Tensor:
    """What a norm multiplies by."""
    return 1.0 + weight if one_plus else weight


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the hidden dim. Shapes: [..., h] -> the same."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.epsilon, self.one_plus = config.norm_epsilon, config.apply_layernorm_1p
        self.weight = sharded_parameter((config.hidden_size,), Replicate(), tp)
        self.bias = sharded_parameter((config.hidden_size,), Replicate(), tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _factor(local(self.weight), self.one_plus)
        return F.layer_norm(x, x.shape[-1:], weight, local(self.bias), self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the hidden dim (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.epsilon, self.one_plus = config.norm_epsilon, config.apply_layernorm_1p
        self.weight = sharded_parameter((config.hidden_size,), Replicate(), tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], _factor(local(self.weight), self.one_plus), self.epsilon)


class HeadNorm(nn.Module):
    """The model's norm over the channels of each head, with one weight for all heads. Shapes: [k, b, n/t, d] -> same"""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.tp, self.epsilon, self.one_plus = tp, config.norm_epsilon, config.apply_layernorm_1p
        self.weight = sharded_parameter((config.head_dim,), Replicate(), tp)
        has_bias = config.normalization == "LayerNorm"
        self.bias = sharded_parameter((config.head_dim,), Replicate(), tp) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _factor(self.tp.shared_inside(local(self.weight)), self.one_plus)
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)
        return F.layer_norm(x, x.shape[-1:], weight, self.tp.shared_inside(local(self.bias)), self.epsilon)


class AllHeadsRMSNorm(nn.Module):
    """RMSNorm over the channels of all heads together, as in OLMo 2 (https://arxiv.org/abs/2501.00656, section 3.2).
    The heads are sharded, so the mean is over the squares of all shards. With fewer heads than processes, several hold
    a copy of one. Shapes: [k, b, n/t, d] -> the same"""

    def __init__(self, config: ModelConfig, heads: int, tp: TensorParallel):
        super().__init__()
        self.tp, self.epsilon, self.one_plus = tp, config.norm_epsilon, config.apply_layernorm_1p
        self.heads, self.copies = heads, max(1, tp.size // heads)
        self.first_head = tp.shard_span(heads * self.copies)[0] // self.copies
        self.weight = sharded_parameter((heads * config.head_dim,), Shard(0), tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = self.tp.sum_of_shards(wide.square().sum(dim=(-2, -1), keepdim=True))
        normal = wide * torch.rsqrt(squares / (self.copies * self.weight.shape[0]) + self.epsilon)
        weight = local(self.weight)
        if self.copies > 1:
            weight = self.tp.gather_shards(weight).chunk(self.heads)[self.first_head]
        return (normal * _factor(weight, self.one_plus).unflatten(0, x.shape[-2:])).to(x.dtype)


def build_query_key_norm(config: ModelConfig, heads: int, tp: TensorParallel) -> nn.Module | None:
    """The norm of queries, or of keys, of so many heads; None without --qk-layernorm."""
    if not config.qk_layernorm:
        return None
    return AllHeadsRMSNorm(config, heads, tp) if config.qk_layernorm_all_heads else HeadNorm(config, tp)


def build_norm(config: ModelConfig, tp: TensorParallel) -> nn.Module:
    return LayerNorm(config, tp) if config.normalization == "LayerNorm" else RMSNorm(config, tp)
