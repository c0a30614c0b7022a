"""Maps token ids to the residual stream."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.shapes import TOKEN_TYPES
from megatron_ltd.model.dropout import dropout
from megatron_ltd.model.ngrams import NGrams, sign_patterns
from megatron_ltd.model.norm import build_norm
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import VocabParallelEmbedding, local, sharded_parameter


class Table(nn.Module):
    """A learned vector for each position, or for each token type. Shapes: indices [s, b or 1] -> [s, b or 1, h]"""

    def __init__(self, rows: int, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.weight = sharded_parameter((rows, config.hidden_size), Replicate(), tp)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices, local(self.weight))


class Embedding(nn.Module):
    """Word embeddings with those of n-grams, normalised or not, plus learned positions and BERT's token types, if the
    model has them. The vector of a bag is the mean of its tokens' vectors.

    Shapes:
        tokens [b, s] or bags [b, s, k], positions [s, b or 1], dropout keys [s/t or s, b], token types [b, s]
        -> [s/t or s, b, h]
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.hidden_dropout = config.hidden_dropout
        self.word = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size, tp)
        rows = 0 if config.ngram_rows is None else (config.ngram_length - 1) * config.ngram_rows
        self.ngram = VocabParallelEmbedding(rows, config.hidden_size, tp) if rows else None
        self.signs: torch.Tensor | None = None
        self.norm = build_norm(config, tp) if config.embed_layernorm else None
        learned = config.position_embedding_type == "learned_absolute"
        self.position = Table(config.max_positions, config, tp) if learned else None
        self.token_type = Table(TOKEN_TYPES, config, tp) if config.has_binary_head else None

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor | None,
                token_types: torch.Tensor | None = None, ngrams: NGrams | None = None) -> torch.Tensor:
        x = self.word(tokens.transpose(0, 1))  # [s, b, h] or [s, b, k, h]
        if self.ngram is not None:
            assert ngrams is not None, "a model with a table of n-grams is given those of its samples"
            vectors = self.ngram(ngrams.rows.transpose(0, 1))
            x = x + (vectors * self._signs(ngrams.patterns.transpose(0, 1), vectors)).sum(dim=-2)
        x = self.tp.exit(x if x.dim() == 3 else x.mean(dim=2))  # [s/t or s, b, h]
        if self.norm is not None:
            x = self.norm(x)
        first, count = self.tp.sequence_span(tokens.shape[1])
        if self.position is not None:
            x = x + self.position(positions[first:first + count])
        if self.token_type is not None:
            assert token_types is not None, "a model with token types is given those of its samples"
            x = x + self.token_type(token_types.t()[first:first + count])
        return dropout(x, keys, self.hidden_dropout)

    def _signs(self, patterns: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Shapes: [...] -> [..., h]"""
        if self.signs is None or (self.signs.device, self.signs.dtype) != (like.device, like.dtype):
            self.signs = sign_patterns(like.shape[-1], like.device, like.dtype)
        return F.embedding(patterns, self.signs)
