"""GPT, or the part of one that a pipeline stage holds.

    tokens -> embedding -> stack -> final norm -> head and loss

A stage that holds the first layer has the embedding, one that holds the last has the head; a stage with both is the
whole model. Layers keep their global number wherever they live.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import Shard

from megatron_ltd.config import ModelConfig
from megatron_ltd.model.embedding import Embedding
from megatron_ltd.model.facts import SampleFacts
from megatron_ltd.model.norm import build_norm
from megatron_ltd.model.stack import Stack, TokenDrop
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.cross_entropy import VocabShard, head_loss, token_log_probabilities
from megatron_ltd.parallel.layers import local, sharded_parameter


class OutputEmbedding(nn.Module):
    """The head's weight; its product with hidden states is taken together with the loss."""

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


class GPT(nn.Module):
    """The layers of `span`, with the embedding and the head if they belong to it.

    In training mode the last stage returns the sum of the masked cross-entropy over the microbatch (fp32 scalar); in
    evaluation mode the log-probability of each label, and 1.0 where it is the most probable token.

    Shapes:
        x: tokens [b, s] int64 on the first stage, the residual stream [s/t or s, b, h] on the others
        labels [b, s] int64, loss_mask [b, s] fp32, sample_ids [b] int64, position_ids and document_ids [b, s] int64
        -> the residual stream; on the last stage a scalar in training, [2, b, s] fp32 in evaluation
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, span: StageSpan, *, drop: TokenDrop | None = None,
                 seed: int = 0, recompute: str = "none"):
        super().__init__()
        assert config.vocab_size is not None
        self.config, self.tp, self.span, self.seed = config, tp, span, seed
        self.embedding = Embedding(config, tp) if span.has_embedding else None
        self.stack = Stack(config, tp, range(span.first, span.stop), drop or TokenDrop(), recompute)
        self.final_norm = build_norm(config, tp) if span.has_head else None
        # A whole model shares one parameter; stages that are apart hold equal copies, and add up their gradients.
        needs_head = span.has_head and not (config.tied and span.has_embedding)
        self.head = OutputEmbedding(config, tp) if needs_head else None
        self.vocab = VocabShard.of(config.padded_vocab_size, config.vocab_size, tp)

    def forward(self, x: torch.Tensor, *, labels: torch.Tensor, loss_mask: torch.Tensor, sample_ids: torch.Tensor,
                position_ids: torch.Tensor | None = None, document_ids: torch.Tensor | None = None) -> torch.Tensor:
        facts = SampleFacts(self.config, self.tp, self.seed, self.training, labels.shape[1], sample_ids, position_ids,
                            document_ids)
        if self.embedding is not None:
            x = self.embedding(x, facts.positions(), facts.embedding_keys())
        x = self.stack(x, facts)
        if self.final_norm is None:
            return x
        return self._head(self.final_norm(x), labels, loss_mask)

    def output_weight(self) -> torch.Tensor:
        if self.head is not None:
            return self.head.weight
        assert self.embedding is not None
        return self.embedding.word.weight

    def _head(self, x: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.tp.enter(x).flatten(0, 1)  # [s * b, h]
        weight, targets = local(self.output_weight()), labels.t().flatten()
        if self.training:
            return head_loss(hidden, weight, targets, loss_mask.t().flatten(), self.vocab)
        log_probabilities, greedy = token_log_probabilities(hidden, weight, targets, self.vocab)
        both = torch.stack((log_probabilities, greedy.float()))
        return both.unflatten(1, (labels.shape[1], labels.shape[0])).transpose(1, 2).contiguous()  # [2, b, s]
