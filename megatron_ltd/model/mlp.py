"""The position-wise feed-forward network."""

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ltd.config import ModelConfig
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """fc2(gelu(fc1(x))). Shapes: [k/t or k, b, h] -> the same"""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.approximation = "tanh" if config.openai_gelu else "none"
        bias = not config.disable_bias_linear
        self.fc1 = ColumnParallelLinear(config.hidden_size, config.ffn, tp, bias=bias)
        self.fc2 = RowParallelLinear(config.ffn, config.hidden_size, tp, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.tp.enter(x)), approximate=self.approximation))


class GatedMLP(nn.Module):
    """fc2(silu(gate(x)) * up(x)), SwiGLU (https://arxiv.org/abs/2002.05202). Shapes: [k/t or k, b, h] -> the same

    Gate and up are two parameters rather than one, so that a shard of each holds the same features.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        bias = not config.disable_bias_linear
        self.gate = ColumnParallelLinear(config.hidden_size, config.ffn, tp, bias=bias)
        self.up = ColumnParallelLinear(config.hidden_size, config.ffn, tp, bias=bias)
        self.fc2 = RowParallelLinear(config.ffn, config.hidden_size, tp, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tp.enter(x)
        return self.fc2(F.silu(self.gate(x)) * self.up(x))


def build_mlp(config: ModelConfig, tp: TensorParallel) -> nn.Module:
    return GatedMLP(config, tp) if config.swiglu else MLP(config, tp)
