"""BERT, or the part of one that a pipeline stage holds: Megatron-LM's pre-norm variant (https://arxiv.org/abs/1909.08053,
section 5.3), with masked-token and sentence-order heads.

    tokens -> embedding -> stack -> final norm -+-> predicted tokens -> dense, gelu, norm -> tied weight + bias -> loss
                                                +-> first token -> dense, tanh -> 2 logits -> loss
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.shapes import SENTENCE_ORDERS
from megatron_ltd.model.attention.context import Microbatch
from megatron_ltd.model.norm import build_norm
from megatron_ltd.model.transformer import StageSpan, Transformer
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.cross_entropy import head_loss, token_log_probabilities
from megatron_ltd.parallel.layers import ReplicatedLinear, local, sharded_parameter
from megatron_ltd.token_drop.importance_table import LossRecord
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policies.importance import given_sets
from megatron_ltd.token_drop.registry import Policies


class MaskedTokenHead(nn.Module):
    """The transformation between the final norm and the output embedding, and the bias of the logits.

    Shapes:
        x [p/t or p, b, h] -> the same
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.dense = ReplicatedLinear(config.hidden_size, config.hidden_size, tp)
        self.norm = build_norm(config, tp)
        self.bias = sharded_parameter((config.padded_vocab_size,), Shard(0), tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.dense(x)))


class BERT(Transformer):
    """A stage of BERT.

    In training mode the last stage returns sums over the microbatch: the masked cross-entropy of the predicted tokens,
    and, with the binary head, the cross-entropy of the sentence order. In evaluation mode it returns log-probabilities
    of the labels, and 1.0 where they are most probable; with the binary head the sentence order is an additional
    column.

    Shapes:
        x: tokens [b, s] int64 on the first stage, the residual stream [s/t or s, b, h] on the others
        padding_mask [b, s] bool, True for real tokens; predicted_positions and labels [b, p] int64; loss_mask [b, p]
        fp32; sample_ids [b] int64; token_types [b, s] int64 and sentence_order [b] int64 with the binary head;
        kept [b, k] int64
        -> the residual stream; on the last stage [1 or 2] fp32 in training, [2, b, p or p + 1] fp32 in evaluation
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, span: StageSpan, *, policies: Policies | None = None,
                 seed: int = 0, recompute: str = "none"):
        super().__init__(config, tp, span, policies=policies, seed=seed, recompute=recompute)
        self.lm_head = MaskedTokenHead(config, tp) if span.has_head else None
        has_binary_head = span.has_head and config.has_binary_head
        self.pooler = ReplicatedLinear(config.hidden_size, config.hidden_size, tp) if has_binary_head else None
        self.binary_head = ReplicatedLinear(config.hidden_size, SENTENCE_ORDERS, tp) if has_binary_head else None

    def forward(self, x: torch.Tensor, *, padding_mask: torch.Tensor, predicted_positions: torch.Tensor,
                labels: torch.Tensor, loss_mask: torch.Tensor, sample_ids: torch.Tensor,
                token_types: torch.Tensor | None = None, sentence_order: torch.Tensor | None = None,
                kept: torch.Tensor | None = None, plan: StepPlan | None = None,
                loss_record: LossRecord | None = None) -> torch.Tensor:
        """Args: see `GPT.forward`."""
        batch = Microbatch(padding_mask.shape[1], sample_ids, padding_mask=padding_mask)
        contexts = self.contexts(batch)
        if self.embedding is not None:
            x = self.embedding(x, batch.positions(), contexts.embedding_keys(), token_types)
        x = self.stack(x, contexts, plan, given_sets(kept))
        if self.final_norm is None:
            return x
        x = self.final_norm(x)
        hidden = self._predicted(x, predicted_positions)
        if not self.training:
            return self._score(x, hidden, labels, sentence_order)
        total = self._masked_token_loss(hidden, labels, loss_mask, loss_record)
        if sentence_order is None:
            return torch.stack((total,))  # no view: FSDP2 attaches its hooks to what a module returns
        losses = F.cross_entropy(self._sentence_logits(x), sentence_order, reduction="sum")
        # With sequence parallelism only one process holds the first token; the results of the others are discarded, and
        # their gradients must be zero rather than missing.
        first, _ = self.tp.sequence_span(padding_mask.shape[1])
        return torch.stack((total, losses if first == 0 else losses * 0.0))

    def _predicted(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states of the predicted tokens, transformed for the output embedding.

        The transformation is split over the predictions like a layer's norms over the sequence.

        Shapes:
            x [s/t or s, b, h], positions [b, p] -> [p * b, h]
        """
        assert self.lm_head is not None
        samples = torch.arange(positions.shape[0], device=positions.device)
        predictions = positions.shape[1]
        positions = F.pad(positions, (0, -predictions % self.tp.size))
        first, count = self.tp.sequence_span(positions.shape[1])
        taken = self.tp.whole_sequence(x)[positions.t()[first:first + count], samples]  # [p/t or p, b, h]
        return self.tp.enter(self.lm_head(taken))[:predictions].flatten(0, 1)

    def _masked_token_loss(self, hidden: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor,
                           loss_record: LossRecord | None) -> torch.Tensor:
        assert self.lm_head is not None
        targets, mask = labels.t().flatten(), loss_mask.t().flatten()
        total, losses, _ = head_loss(hidden, local(self.output_weight()), targets, mask, self.vocab,
                                     local(self.lm_head.bias))
        if loss_record is not None:
            loss_record.add(targets, losses, mask)
        return total

    def _sentence_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: x [s/t or s, b, h] -> [b, 2] fp32"""
        assert self.pooler is not None and self.binary_head is not None
        return self.binary_head(torch.tanh(self.pooler(x[0]))).float()

    def _score(self, x: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor,
               sentence_order: torch.Tensor | None) -> torch.Tensor:
        assert self.lm_head is not None
        log_probabilities, greedy = token_log_probabilities(
            hidden, local(self.output_weight()), labels.t().flatten(), self.vocab, local(self.lm_head.bias))
        both = torch.stack((log_probabilities, greedy.float()))
        both = both.unflatten(1, (labels.shape[1], labels.shape[0])).transpose(1, 2)  # [2, b, p]
        if sentence_order is None:
            return both.contiguous()
        logits = self._sentence_logits(x)
        order = torch.stack((logits.log_softmax(dim=1).gather(1, sentence_order[:, None]),
                             (logits.argmax(dim=1) == sentence_order)[:, None].float()))  # [2, b, 1]
        return torch.cat((both, order), dim=2)
