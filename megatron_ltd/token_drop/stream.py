"""The residual stream, updated in place.

A dropped layer reads the kept rows of the stream and adds its update to them:

    stream[rows] += block(stream[rows])

and consecutive layers with the same rows take them once and put them back after the last:

    x = stream[rows];  x += block(x), ...;  stream[rows] = x

Neither the forward nor the backward pass touches the other rows, and nothing of full length is saved:

    forward    own -> take, add -> take, ..., put -> release          one copy for a whole run of dropped layers
    backward   own <- take, add <- take, ..., put <- release          one copy

`own` copies the stream so that it may be overwritten; `release` copies the incoming gradient so that *it* may be
overwritten. Between the two, nothing else reads the full-length stream or its gradient, which makes the in-place
operations of `take`, `add` and `put` safe. Each function returns the exact derivative of what it computes.

Rows are distinct, so sums are formed apart and copied: on GPUs `index_add_` would use atomic operations.

The stream is [s, b, h]; row r is position r // b of sample r % b.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def _rows(stream: torch.Tensor) -> torch.Tensor:
    """The stream as a matrix with one row per token, without a copy. Shapes: [s, b, h] -> [s * b, h]"""
    return stream.view(-1, stream.shape[-1])


def _add_rows(stream: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    matrix = _rows(stream)
    matrix.index_copy_(0, rows, matrix.index_select(0, rows).add_(values))


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor) -> torch.Tensor:
        return stream.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rows)
        # Declared dirty though unchanged: the stream is returned as the same tensor, not as a view that `_Add` could
        # not write to, and its gradient passes through this node.
        ctx.mark_dirty(stream)
        return stream, _rows(stream).index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_stream: torch.Tensor, grad_taken: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        _add_rows(grad_stream, rows, grad_taken)
        return grad_stream, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, rows: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.mark_dirty(stream)
        _add_rows(stream, rows, update)
        return stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (rows,) = ctx.saved_tensors
        return grad, None, _rows(grad).index_select(0, rows)


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.mark_dirty(stream)
        _rows(stream).index_copy_(0, rows, values)
        return stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (rows,) = ctx.saved_tensors
        of_values = _rows(grad).index_select(0, rows)
        _rows(grad).index_fill_(0, rows, 0.0)  # what the rows held before was overwritten
        return grad, None, of_values


class _Release(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(stream)  # returned as the same tensor: the pipeline engine cannot detach a view
        return stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.clone(memory_format=torch.contiguous_format)


def own(stream: torch.Tensor) -> torch.Tensor:
    """A copy of the stream that `take` and `add` may overwrite. Shapes: [s, b, h] -> the same."""
    return _Own.apply(stream)


def take(stream: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream, to be used instead of the argument from here on, and a copy of its `rows`.

    Shapes:
        stream [s, b, h], rows [k * b] -> [s, b, h], [k * b, h]
    """
    return _Take.apply(stream, rows)


def add(stream: torch.Tensor, rows: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """`stream[rows] += update`, in place; use the result instead of the argument.

    Shapes:
        stream [s, b, h], rows [k * b], update [k * b, h] -> [s, b, h]
    """
    return _Add.apply(stream, rows, update)


def put(stream: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`stream[rows] = values`, in place; use the result instead of the argument.

    Shapes:
        stream [s, b, h], rows [k * b], values [k * b, h] -> [s, b, h]
    """
    return _Put.apply(stream, rows, values)


def release(stream: torch.Tensor) -> torch.Tensor:
    """The end of a run of dropped layers: from here on the stream is not overwritten. Shapes: unchanged."""
    return _Release.apply(stream)
