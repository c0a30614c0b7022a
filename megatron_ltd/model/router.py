"""The router of a Mixture-of-Depths layer (https://arxiv.org/abs/2404.02258, sections 3.4 and 3.5).

In training the tokens with the largest scores are chosen, which depends on later tokens. In evaluation a token must not
depend on them, so a predictor decides for each token alone. It learns from the choices in training, by binary
cross-entropy on inputs without a gradient, so that it does not affect the rest of the model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import ReplicatedLinear
from megatron_ltd.token_drop.sampling import positions_of_largest


class _AlsoMinimise(torch.autograd.Function):
    """x, whose backward pass also minimises a scalar: losses of inner stages of a pipeline reach no output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scalar: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.ones((), device=grad.device)


class Router(nn.Module):
    """Scores of tokens, and a prediction of which are among the largest."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.tp, self.strata = tp, config.mixture_of_depths_strata
        self.score = ReplicatedLinear(config.hidden_size, 1, tp, bias=False)
        self.predictor = ReplicatedLinear(config.hidden_size, 1, tp)

    def forward(self, stream: torch.Tensor, kept_tokens: int,
                weight: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores, and the positions of the tokens to process.

        Args:
            weight: of a token in the predictor's loss; one number, or the same one for each sample.

        Shapes:
            stream [s/t or s, b, h], weight [b] -> [s/t or s, b], [b, k] int64 ascending
        """
        scores = self.score(stream)[..., 0]
        of_samples = self.tp.whole_sequence(scores.detach()).t()  # [b, s]
        kept = positions_of_largest(of_samples, kept_tokens, self.strata)
        first, count = self.tp.sequence_span(of_samples.shape[1])
        chosen = torch.zeros_like(of_samples, dtype=torch.float32).scatter_(1, kept, 1.0)[:, first:first + count].t()
        logits = self.predictor(stream.detach())[..., 0].float()
        loss = F.binary_cross_entropy_with_logits(logits, chosen, reduction="sum")
        return _AlsoMinimise.apply(scores, (loss * weight).mean()), kept

    def predict(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of the tokens that are predicted to be chosen, 0 for all others; and which these are.

        Shapes:
            stream [s/t or s, b, h] -> [s/t or s, b], [b, s] bool
        """
        logits = self.predictor(stream)[..., 0]
        scores = self.score(stream)[..., 0].masked_fill(logits <= 0.0, 0.0)
        return scores, (self.tp.whole_sequence(logits) > 0.0).t()
