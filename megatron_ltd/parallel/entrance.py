"""The products with which a tensor-parallel region begins, and the communication that runs beside them.

    without sequence parallelism        backward: dx is summed over the processes while dW is computed
    with                                forward: x is gathered, and dropped again after the products
                                        backward: x is gathered while dx is computed, dx is summed and scattered while
                                        dW is computed

(https://arxiv.org/abs/2205.05198, section 4.2.2, keeps the slice alike.) An accelerator runs both at once; so do
gloo's threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_ltd.parallel.collectives import (
    Pending,
    TensorParallel,
    all_gather,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)

Linear = tuple[torch.Tensor, torch.Tensor | None]
"""Local weight [o/t, i] and bias [o/t]."""


class _Kept(torch.autograd.Function):
    """What the products read, kept by a node of its own: under recomputation it is the last thing that is recomputed,
    while the products, whose result it precedes, are not repeated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keeper: Any, tp: TensorParallel, *operands: Any,
                ) -> tuple[torch.Tensor, ...]:
        ctx.keeper, ctx.tp = keeper, tp
        ctx.biased = [bias is not None for bias in operands[1::2]]
        ctx.save_for_backward(*operands[::2], *(() if keeper else (x,)))
        if tp.slices_sequence:
            x = all_gather(x, tp.group)
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(operands[::2], operands[1::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved: list[torch.Tensor] = [*ctx.saved_tensors, *(ctx.keeper.saved_tensors if ctx.keeper else ())]
        weights, x, tp = saved[:-1], saved[-1], ctx.tp
        # A split backward pass comes here twice: for the input, and later for the weights.
        for_input, *for_weights = (node is not None and torch._C._will_engine_execute_node(node)
                                   for node, _ in ctx.next_functions)
        gathering = start_all_gather(x, tp.group) if any(for_weights) and tp.slices_sequence else lambda: x
        rows = [grad.flatten(0, -2) for grad in grads]
        of_input = _start_summing(rows, weights, grads[0].shape[:-1], tp) if for_input else None
        of_operands: list[torch.Tensor | None] = []
        if any(for_weights):
            read = gathering().flatten(0, -2)
            for grad, biased in zip(rows, ctx.biased, strict=True):
                of_operands += [grad.t() @ read, grad.sum(0) if biased else None]
        return None if of_input is None else of_input(), None, None, *(of_operands or [None] * 2 * len(weights))


def _start_summing(rows: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], shape: torch.Size,
                   tp: TensorParallel) -> Pending:
    """The input's gradient, of which each process has a part. Shapes: rows [s b, o/t], weights [o/t, i] -> [s, b, i]
    or [s/t, b, i]"""
    part = rows[0] @ weights[0]
    for grad, weight in zip(rows[1:], weights[1:], strict=True):
        part += grad @ weight
    part = part.view(*shape, -1)
    if tp.slices_sequence:
        return start_reduce_scatter(part, tp.group)
    return start_all_reduce(part, tp.group) if tp.size > 1 else lambda: part


def kept(x: torch.Tensor) -> torch.Tensor:
    """x, which `products` reads next. Shapes: unchanged"""
    return _Kept.apply(x)


def products(x: torch.Tensor, linears: Sequence[Linear], tp: TensorParallel) -> tuple[torch.Tensor, ...]:
    """Enter a region with x W^T + b for each linear.

    Args:
        x: from `kept`, which holds it for the backward pass, unless it needs no gradient.

    Shapes:
        x [s, b, i], or [s/t, b, i] with sequence parallelism -> [s, b, o/t] each
    """
    operands = [tensor for linear in linears for tensor in linear]
    return _Products.apply(x, x.grad_fn, tp, *operands)
