"""One transformer layer: attention and MLP, each with a norm before or after it."""

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.attention.layer import Attention, TokenContext
from megatron_ltd.model.dropout import dropout
from megatron_ltd.model.norm import build_norm
from megatron_ltd.model.projection import project
from megatron_ltd.model.recompute import recomputed
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import ColumnParallelLinear, RowParallelLinear


class Block(nn.Module):
    """A layer. It returns the update to the residual stream, not the stream itself.

    The stream stays outside, so that a dropped layer can add to some of its rows in place.

    Args:
        recompute: recompute what the backward pass needs of norms and activation functions, which cost little time and
            much memory, instead of storing it.

    Shapes:
        x [k/t or k, b, h]; context, to which a cross layer attends, [s/t or s, b, h] -> update of the shape of x
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, recompute: bool = False):
        super().__init__()
        self.norms_first = config.norm_placement == "before"
        self.hidden_dropout, self.branch_scale = config.hidden_dropout, 1.0 / config.depth_multiplier
        self.attention_norm = build_norm(config, tp)
        self.attention = Attention(config, tp, recompute=recompute)
        self.mlp_norm = build_norm(config, tp)
        self.mlp = build_mlp(config, tp, recompute=recompute)

    def forward(self, x: torch.Tensor, tokens: TokenContext, context: torch.Tensor | None = None) -> torch.Tensor:
        after_attention, after_mlp = (None, None) if tokens.hidden_keys is None else tokens.hidden_keys
        if not self.norms_first:
            attention = self._branch(self.attention_norm(self.attention(x, tokens, context)), after_attention)
            return attention + self._branch(self.mlp_norm(self.mlp(x + attention)), after_mlp)
        attention = self._branch(self.attention(x, tokens, context, self.attention_norm), after_attention)
        return attention + self._branch(self.mlp(x + attention, self.mlp_norm), after_mlp)

    def _branch(self, output: torch.Tensor, dropout_keys: torch.Tensor | None) -> torch.Tensor:
        """What attention or the MLP adds to the residual stream."""
        output = dropout(output, dropout_keys, self.hidden_dropout)
        return output if self.branch_scale == 1.0 else output * self.branch_scale


class MLP(nn.Module):
    """fc2(gelu(fc1(x))). Shapes: [k/t or k, b, h] -> the same

    Args:
        recompute: see `Block`.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, recompute: bool = False):
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.approximation = "tanh" if config.openai_gelu else "none"
        self.fc1 = ColumnParallelLinear(config.hidden_size, config.ffn, tp, bias=config.mlp_bias)
        self.fc2 = RowParallelLinear(config.ffn, config.hidden_size, tp, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """Args:
            norm: is applied to x first.
        """
        recompute = self.recompute and self.training
        (wide,) = project(x, [self.fc1.linear], self.tp, norm, recompute)
        return recomputed(recompute, lambda wide: self.fc2(F.gelu(wide, approximate=self.approximation)), wide)


class GatedMLP(nn.Module):
    """fc2(silu(gate(x)) * up(x)), SwiGLU (https://arxiv.org/abs/2002.05202). Shapes: [k/t or k, b, h] -> the same

    Gate and up are two parameters rather than one, so that a shard of each holds the same features.

    Args:
        recompute: see `Block`.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, recompute: bool = False):
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.gate = ColumnParallelLinear(config.hidden_size, config.ffn, tp, bias=config.mlp_bias)
        self.up = ColumnParallelLinear(config.hidden_size, config.ffn, tp, bias=config.mlp_bias)
        self.fc2 = RowParallelLinear(config.ffn, config.hidden_size, tp, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """Args:
            norm: is applied to x first.
        """
        recompute = self.recompute and self.training
        gate, up = project(x, [self.gate.linear, self.up.linear], self.tp, norm, recompute)
        return recomputed(recompute, lambda gate, up: self.fc2(F.silu(gate) * up), gate, up)


def build_mlp(config: ModelConfig, tp: TensorParallel, *, recompute: bool) -> nn.Module:
    return GatedMLP(config, tp, recompute=recompute) if config.swiglu else MLP(config, tp, recompute=recompute)
