"""GPT, or the part of one that a pipeline stage holds.

    tokens -> embedding -> stack -> final norm -> head and loss

A stage that holds the first layer has the embedding, one that holds the last has the head; a stage with both is the
whole model. Layers keep their global number on every stage.
"""

import torch

from megatron_ltd.model.attention.context import Microbatch
from megatron_ltd.model.ngrams import ngrams_of
from megatron_ltd.model.transformer import Transformer
from megatron_ltd.parallel.cross_entropy import head_loss, token_log_probabilities
from megatron_ltd.parallel.layers import local
from megatron_ltd.token_drop.importance_table import LossRecord
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policies.importance import given_sets


class GPT(Transformer):
    """A stage of GPT.

    In training mode the last stage returns the sum of the masked cross-entropy over the microbatch, and that of the
    z-loss if there is one, whose gradient comes with the first; in evaluation mode the log-probability of each label
    that the mask keeps, and 1.0 where it is the most probable token; zeros elsewhere.

    Shapes:
        x: tokens [b, s] int64 on the first stage, the residual stream [s/t or s, b, h] on the others
        labels [b, s] int64, loss_mask [b, s] fp32, sample_ids [b] int64, position_ids and document_ids [b, s] int64,
        kept [b, k] int64, asked [p] int64; with bags of n tokens: tokens, labels and loss_mask [b, s, n]
        -> the residual stream; on the last stage [1 or 2] fp32 in training, [2, b, s] fp32 in evaluation
    """

    def forward(self, x: torch.Tensor, *, labels: torch.Tensor, loss_mask: torch.Tensor, sample_ids: torch.Tensor,
                position_ids: torch.Tensor | None = None, document_ids: torch.Tensor | None = None,
                most_documents: int | None = None, kept: torch.Tensor | None = None,
                asked: torch.Tensor | None = None, plan: StepPlan | None = None,
                loss_record: LossRecord | None = None, router_weight: float | torch.Tensor = 0.0,
                z_coefficient: float = 0.0) -> torch.Tensor:
        """Args:
            most_documents: see `Microbatch`.
            asked: in evaluation, where the loss mask is not zero, as rows of [s, b]; None looks for them on the device,
                for which the host waits.
            plan: what the step computes; None: every token in every layer.
            loss_record: records the loss of every predicted token.
            router_weight: of a token in the loss of the routers' predictors (Mixture-of-Depths).
            z_coefficient: of the z-loss; 0 for none.
        """
        batch = Microbatch(labels.shape[1], sample_ids, position_ids, document_ids, most_documents)
        contexts = self.contexts(batch)
        if self.embedding is not None:
            ngrams = ngrams_of(x, self.config, documents=document_ids)
            x = self.embedding(x, batch.positions(), contexts.embedding_keys(), ngrams=ngrams)
        x = self.stack(x, contexts, plan, given_sets(kept), router_weight)
        if self.final_norm is None:
            return x
        return self._head(self.final_hidden(x), labels, loss_mask, asked, loss_record, z_coefficient)

    def _head(self, x: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, asked: torch.Tensor | None,
              loss_record: LossRecord | None, z_coefficient: float) -> torch.Tensor:
        hidden = self.tp.enter(x).flatten(0, 1)  # [s * b, h]
        weight = local(self.output_weight())
        targets, mask = (x.transpose(0, 1).flatten(0, 1) for x in (labels, loss_mask))
        if self.training:
            total, losses, z_total = head_loss(hidden, weight, targets, mask, self.vocab, z_coefficient=z_coefficient)
            if loss_record is not None:
                loss_record.add(targets, losses, mask)
            # No view: FSDP2 attaches its hooks to what a module returns.
            return torch.stack((total, z_total) if z_coefficient > 0.0 else (total,))
        # The head is most of a small model, so it is applied only to the unmasked tokens.
        asked = mask.nonzero()[:, 0] if asked is None else asked
        both = torch.zeros(2, len(targets), device=hidden.device)
        if len(asked):
            log_probabilities, greedy = token_log_probabilities(hidden[asked], weight, targets[asked], self.vocab)
            both[:, asked] = torch.stack((log_probabilities, greedy.float()))
        return both.unflatten(1, (labels.shape[1], labels.shape[0])).transpose(1, 2).contiguous()  # [2, b, s]
