"""The common part of GPT and BERT: embedding, layers, final norm and output embedding, or a stage's share of them."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import Shard

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.attention.context import ContextMaker, Microbatch
from megatron_ltd.model.embedding import Embedding
from megatron_ltd.model.norm import build_norm
from megatron_ltd.model.stack import Stack
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.cross_entropy import VocabShard
from megatron_ltd.parallel.layers import sharded_parameter
from megatron_ltd.token_drop.policy import Shape
from megatron_ltd.token_drop.registry import Policies


class OutputEmbedding(nn.Module):
    """The head's weight; its product with hidden states is computed together with the loss."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.weight = sharded_parameter((config.padded_vocab_size, config.hidden_size), Shard(0), tp)


@dataclass(frozen=True)
class StageSpan:
    """The layers [first, stop) of `layers`."""

    first: int
    stop: int
    layers: int

    @property
    def has_embedding(self) -> bool:
        return self.first == 0

    @property
    def has_head(self) -> bool:
        return self.stop == self.layers


def no_policies(config: ModelConfig) -> Policies:
    """Every token in every layer."""
    return Policies(Shape(config.family, config.num_layers, config.seq_length), ())


class Transformer(nn.Module):
    """The layers of `span`, with the embedding and the head if they belong to it.

    Models differ in their inputs and in what they predict.

    Args:
        seed: of dropout.
        recompute: see `Stack`.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, span: StageSpan, *, policies: Policies | None = None,
                 seed: int = 0, recompute: str = "none"):
        super().__init__()
        assert config.vocab_size is not None
        self.config, self.tp, self.span, self.seed = config, tp, span, seed
        self.embedding = Embedding(config, tp) if span.has_embedding else None
        self.stack = Stack(config, tp, range(span.first, span.stop), policies or no_policies(config),
                           recompute)
        self.final_norm = build_norm(config, tp) if span.has_head else None
        # A whole model shares one parameter; separate stages hold equal copies and sum their gradients.
        needs_head = span.has_head and not (config.tied and span.has_embedding)
        self.head = OutputEmbedding(config, tp) if needs_head else None
        self.vocab = VocabShard.of(config.padded_vocab_size, config.vocab_size, tp)

    def final_hidden(self, x: torch.Tensor) -> torch.Tensor:
        """What the head multiplies with the output embedding. Shapes: [s/t or s, b, h] -> the same"""
        assert self.final_norm is not None
        x, width = self.final_norm(x), self.config.width_multiplier
        return x if width == 1.0 else x / width

    def output_weight(self) -> torch.Tensor:
        if self.head is not None:
            return self.head.weight
        assert self.embedding is not None
        return self.embedding.word.weight

    def contexts(self, batch: Microbatch) -> ContextMaker:
        """For the current microbatch."""
        return ContextMaker(self.config, self.tp, self.seed, self.training, batch)
