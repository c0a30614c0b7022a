"""ViT (https://arxiv.org/abs/2010.11929): images as patches, layers as in BERT and GPT, a class token, a classifier.

    image -> patches -> linear; class token in front; + positions -> stack -> final norm -> first token -> classifier

The class token is treated like any other token: a dropped layer keeps it just as often.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.attention.context import ContextMaker, Microbatch
from megatron_ltd.model.dropout import dropout
from megatron_ltd.model.embedding import Table
from megatron_ltd.model.norm import build_norm
from megatron_ltd.model.stack import Stack
from megatron_ltd.model.transformer import StageSpan, no_policies
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import ReplicatedLinear, local, sharded_parameter
from megatron_ltd.token_drop.importance_table import LossRecord
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.registry import Policies

TOP = 5
POSITIONS = "embedding.position.weight"
CLASSIFIER = ("classifier.weight", "classifier.bias")


class PatchEmbedding(nn.Module):
    """A linear layer on the numbers of each patch, the class token, and learned positions.

    Shapes:
        images [b, c, H, W], dropout keys [s/t or s, b] -> [s/t or s, b, h]
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        assert config.patch_dim is not None
        self.tp, self.patch_dim, self.hidden_dropout = tp, config.patch_dim, config.hidden_dropout
        self.patch = ReplicatedLinear(config.patch_values, config.hidden_size, tp)
        self.class_token = sharded_parameter((config.hidden_size,), Replicate(), tp)
        self.position = Table(config.seq_length, config, tp)

    def forward(self, images: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        weight = local(self.patch.weight)
        q = self.patch_dim
        patches = images.unfold(2, q, q).unfold(3, q, q).permute(2, 3, 0, 1, 4, 5)  # [H/q, W/q, b, c, q, q]
        x = self.patch(patches.flatten(3).flatten(0, 1).to(weight.dtype))  # [s - 1, b, h]
        x = torch.cat((local(self.class_token).expand(1, x.shape[1], -1), x))  # [s, b, h]
        first, count = self.tp.sequence_span(x.shape[0])
        places = torch.arange(first, first + count, device=x.device)[:, None]
        return dropout(x[first:first + count] + self.position(places), keys, self.hidden_dropout)


class ViT(nn.Module):
    """A whole ViT.

    In training mode it returns the sum of the masked cross-entropy over the microbatch; in evaluation mode the
    log-probability of each label, 1.0 where it is the most probable class, and 1.0 where it is among the first five.

    Shapes:
        x: images [b, c, H, W]; labels [b, 1] int64, loss_mask [b, 1] fp32, sample_ids [b] int64
        -> [1] fp32 in training, [3, b, 1] fp32 in evaluation
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, span: StageSpan, *, policies: Policies | None = None,
                 seed: int = 0, recompute: str = "none"):
        super().__init__()
        assert config.num_classes is not None and span.has_embedding and span.has_head
        self.config, self.tp, self.span, self.seed = config, tp, span, seed
        self.embedding = PatchEmbedding(config, tp)
        self.stack = Stack(config, tp, range(span.first, span.stop), policies or no_policies(config), recompute)
        self.final_norm = build_norm(config, tp)
        self.classifier = ReplicatedLinear(config.hidden_size, config.num_classes, tp)

    def forward(self, x: torch.Tensor, *, labels: torch.Tensor, loss_mask: torch.Tensor, sample_ids: torch.Tensor,
                plan: StepPlan | None = None, loss_record: LossRecord | None = None) -> torch.Tensor:
        """Args: see `GPT.forward`; losses are not recorded, since patches have no vocabulary ids."""
        labels, mask = labels[:, 0], loss_mask[:, 0]
        logits = self.logits(x, sample_ids, plan)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self.training:
            total = (losses * mask).sum(dim=0, keepdim=True)
            # With sequence parallelism only one process holds the class token; the results of the others are discarded,
            # and their gradients must be zero rather than missing.
            first, _ = self.tp.sequence_span(self.config.seq_length)
            return total if first == 0 else total * 0.0
        of_label = logits.gather(1, labels[:, None])
        better = (logits > of_label).sum(dim=1, keepdim=True)
        return torch.stack((-losses.unsqueeze(1), (better == 0).float(), (better < TOP).float()))

    def logits(self, images: torch.Tensor, sample_ids: torch.Tensor, plan: StepPlan | None = None) -> torch.Tensor:
        """Shapes: [b, c, H, W] -> [b, v] fp32"""
        contexts = ContextMaker(self.config, self.tp, self.seed, self.training,
                                Microbatch(self.config.seq_length, sample_ids))
        x = self.final_norm(self.stack(self.embedding(images, contexts.embedding_keys()), contexts, plan))
        return self.classifier(x[0]).float()


def resized_positions(table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Positions for a different patch grid, by bicubic interpolation; the class token's position is unchanged.

    Shapes:
        [1 + rows columns, h] -> the same for the new grid
    """
    of_patches = table[1:].t().unflatten(1, grid)[None]  # [1, h, rows, columns]
    resized = F.interpolate(of_patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((table[:1], resized[0].flatten(1).t()))
