"""LayerNorm and RMSNorm."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate

from megatron_ltd.config import ModelConfig
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import local, sharded_parameter


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the hidden dim. Shapes: [..., h] -> the same."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.epsilon = config.norm_epsilon
        self.weight = sharded_parameter((config.hidden_size,), Replicate(), tp)
        self.bias = sharded_parameter((config.hidden_size,), Replicate(), tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], local(self.weight), local(self.bias), self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the hidden dim (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.epsilon = config.norm_epsilon
        self.weight = sharded_parameter((config.hidden_size,), Replicate(), tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], local(self.weight), self.epsilon)


def build_norm(config: ModelConfig, tp: TensorParallel) -> nn.Module:
    return LayerNorm(config, tp) if config.normalization == "LayerNorm" else RMSNorm(config, tp)
