"""One transformer layer."""

import torch
from torch import nn

from megatron_ltd.config import ModelConfig
from megatron_ltd.model.attention import Attention, TokenFacts
from megatron_ltd.model.dropout import dropout
from megatron_ltd.model.mlp import build_mlp
from megatron_ltd.model.norm import build_norm
from megatron_ltd.parallel.collectives import TensorParallel


class Block(nn.Module):
    """What a pre-norm layer adds to the residual stream, not the stream itself.

    The stream stays outside, so that a dropped layer can add to some of its rows in place.

    Shapes:
        x [k/t or k, b, h]; context, to which a cross layer attends, [s/t or s, b, h] -> update of the shape of x
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, *, recompute_attention: bool = False):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.attention_norm = build_norm(config, tp)
        self.attention = Attention(config, tp, recompute=recompute_attention)
        self.mlp_norm = build_norm(config, tp)
        self.mlp = build_mlp(config, tp)

    def forward(self, x: torch.Tensor, facts: TokenFacts, context: torch.Tensor | None = None) -> torch.Tensor:
        after_attention, after_mlp = (None, None) if facts.hidden_keys is None else facts.hidden_keys
        context = None if context is None else self.attention_norm(context)
        attention = dropout(self.attention(self.attention_norm(x), facts, context), after_attention,
                            self.hidden_dropout)
        mlp = dropout(self.mlp(self.mlp_norm(x + attention)), after_mlp, self.hidden_dropout)
        return attention + mlp
