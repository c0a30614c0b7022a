"""How a tensor-parallel region begins: the norm, entering, and the products with its first weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ltd.model.recompute import recomputed
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.entrance import Linear, kept, products


def project(x: torch.Tensor, linears: Sequence[Linear], tp: TensorParallel, norm: nn.Module | None,
            recompute: bool) -> tuple[torch.Tensor, ...]:
    """norm(x) W^T + b for each linear.

    Args:
        norm: None: the products read x itself.
        recompute: keep x, and compute its norm again in the backward pass.

    Shapes:
        x [k/t or k, b, h] -> [k, b, o/t] each
    """
    def normalised(x: torch.Tensor) -> torch.Tensor:
        return x if norm is None else norm(x)

    def plain(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = tp.enter(normalised(x))
        return tuple(F.linear(x, weight, bias) for weight, bias in linears)

    if torch.compiler.is_compiling():  # the compiler orders what it captures; it would repeat all products but the last
        return recomputed(recompute and len(linears) == 1, plain, x)
    if not torch.is_grad_enabled() or (tp.size == 1 and not recompute):
        return plain(x)
    return products(recomputed(recompute and norm is not None, lambda x: kept(normalised(x)), x), linears, tp)
