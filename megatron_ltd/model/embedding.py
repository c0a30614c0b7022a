"""From token ids to the residual stream."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate

from megatron_ltd.config import ModelConfig
from megatron_ltd.model.dropout import dropout
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import VocabParallelEmbedding, local, sharded_parameter


class PositionTable(nn.Module):
    """One learned vector for each position. Shapes: positions [s, b or 1] -> [s, b or 1, h]"""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.weight = sharded_parameter((config.max_positions, config.hidden_size), Replicate(), tp)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return F.embedding(positions, local(self.weight))


class Embedding(nn.Module):
    """Word embeddings plus learned positions, if the model has them.

    Shapes:
        tokens [b, s], positions [s, b or 1], dropout keys [s/t or s, b] -> [s/t or s, b, h]
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.hidden_dropout = config.hidden_dropout
        self.word = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size, tp)
        learned = config.position_embedding_type == "learned_absolute"
        self.position = PositionTable(config, tp) if learned else None

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        x = self.word(tokens.t())  # [s/t or s, b, h]
        if self.position is not None:
            first, count = self.tp.sequence_span(tokens.shape[1])
            x = x + self.position(positions[first:first + count])
        return dropout(x, keys, self.hidden_dropout)
