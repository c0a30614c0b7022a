"""Queries, keys and values that also read the tokens just before their own.

    y_i = x_i + sum over d = 1 .. K - 1 of w_d * x_(i - d)      each channel with weights of its own, 0 at first

x is what attention projects from a token and K is --qkv-conv-kernel. It costs K - 1 multiplications a channel, and one
layer can then find what followed an earlier occurrence of a token, for which it takes two layers otherwise. Primer
(https://arxiv.org/abs/2109.08668) convolves so with K = 3, there with drawn weights and one for the token itself; as a
sum that is added it is Canon layer B (https://arxiv.org/abs/2512.17351), with K = 4.

i - d is a place in the sample: where a layer keeps some of the tokens, a token reads those before it that are kept,
with the weights of their distances. It reads nothing beyond the start of the sample, nor of its document where
attention stops at documents.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import Shard

from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.layers import sharded_parameter


class Earlier(NamedTuple):
    """Some of the pairs of a token and an earlier one that it reads.

    Args:
        back: how many rows before its own the earlier token has.
        distance: how many places of the sample before it.

    Shapes:
        where: which tokens there are, of the rows from `back` on, [k - back, b or 1] bool; None: all
    """

    back: int
    distance: int
    where: torch.Tensor | None = None

    def seeing_only(self, chosen: torch.Tensor) -> "Earlier":
        """The same, of the earlier tokens that are chosen. Shapes: chosen [b, c] bool, the rows are the last of c"""
        assert self.where is not None
        count = self.where.shape[0]
        known = F.pad(chosen, (count, 0)).t()  # rows may begin before the text
        end = known.shape[0] - self.back
        return self._replace(where=self.where & known[end - count:end])


Reading = tuple[Earlier, ...]
"""All that tokens read."""


def reading_of(places: torch.Tensor, reach: int, documents: torch.Tensor | None = None, *,
               gaps: bool = True) -> Reading:
    """What the tokens of some rows read.

    Args:
        reach: how far back.
        gaps: whether places may be missing between the rows.

    Shapes:
        places in the sample, ascending, and documents [k, b or 1]
    """
    found = []
    for back in range(1, min(reach, len(places) - 1) + 1):
        gap = places[back:] - places[:-back]
        if documents is not None:
            gap = torch.where(documents[back:] == documents[:-back], gap, reach + 1)
        furthest = reach if gaps else back
        found += [Earlier(back, distance, gap == distance) for distance in range(back, furthest + 1)]
    return tuple(found)


def convolved(x: torch.Tensor, weight: torch.Tensor, reading: Reading | None) -> torch.Tensor:
    """The sums above.

    Args:
        reading: None: of all tokens of the sample, in one document.

    Shapes:
        x [k, b, o], weight [o, K - 1] -> [k, b, o]
    """
    if reading is None:
        reading = tuple(Earlier(back, back) for back in range(1, min(weight.shape[1], len(x) - 1) + 1))
    if torch.compiler.is_compiling():  # it fuses the sums and chooses what to keep
        total = x
        for back, distance, part in _parts(x, reading):
            total = total + F.pad(part * weight[:, distance - 1].to(x.dtype), (0, 0, 0, 0, back, 0))
        return total
    summed: torch.Tensor = _Convolved.apply(x, weight, reading)
    return summed


def _parts(x: torch.Tensor, reading: Sequence[Earlier]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Back, distance, and the rows that are read. Shapes: [k - back, b, o]"""
    for back, distance, where in reading:
        part = x[:-back]
        yield back, distance, part if where is None else part * where[..., None]


class _Convolved(torch.autograd.Function):
    """Keeps x alone for the backward pass, and adds up in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, reading: Reading) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.reading = reading
        total, weights = x.clone(), weight.t().to(x.dtype).contiguous()
        for back, distance, part in _parts(x, reading):
            total[back:].addcmul_(part, weights[distance - 1])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        weights = weight.t().to(x.dtype).contiguous()
        of_x, of_weights = grad.clone(), torch.zeros(weights.shape, dtype=torch.float32, device=x.device)
        for back, distance, where in ctx.reading:
            later = grad[back:] if where is None else grad[back:] * where[..., None]
            of_x[:-back].addcmul_(later, weights[distance - 1])
            of_weights[distance - 1] += (later * x[:-back]).sum((0, 1), dtype=torch.float32)
        # Laid out as the weight: a split backward pass stores it as it is, and fused optimizers read in storage order.
        return of_x, of_weights.to(weight.dtype).t().contiguous(), None


class Convolution(nn.Module):
    """The weights, of all channels of queries, keys and values in the order of their projection's rows.

    Args:
        features: o of the whole layer.
        kernel: K.
    """

    def __init__(self, features: int, kernel: int, tp: TensorParallel):
        super().__init__()
        self.weight = sharded_parameter((features, kernel - 1), Shard(0), tp)
