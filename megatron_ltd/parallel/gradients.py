"""Gradient sums that neither autograd nor FSDP2 computes: of tied copies, and of parameters whose gradients sequence
parallelism splits."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megatron_ltd.parallel.collectives import TensorParallel


def local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The local shard of the gradient."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def missing_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of parameters without a gradient after a backward pass. There must be none: an engine that drops gradients
    without an error makes a run fail silently."""
    return [name for name, parameter in named_parameters if parameter.grad is None]


def zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zero gradients, sharded like the parameters, for parameters that no forward pass used."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def reduce_tied(embedding: nn.Parameter | None, head: nn.Parameter | None, group: dist.ProcessGroup | None) -> None:
    """Set the gradients of both copies of a tied embedding to their sum.

    Equal copies with equal gradients and optimizer state stay equal.

    Args:
        embedding, head: the copies this process holds.
        group: joins the processes that hold one copy each; unused where one process holds both.
    """
    if embedding is not None and head is not None:
        total = local_gradient(embedding) + local_gradient(head)
        local_gradient(embedding).copy_(total)
        local_gradient(head).copy_(total)
    elif embedding is not None or head is not None:
        parameter = embedding if embedding is not None else head
        assert parameter is not None
        dist.all_reduce(local_gradient(parameter), group=group)


def reduce_replicated(parameters: Iterable[nn.Parameter], tp: TensorParallel) -> None:
    """With sequence parallelism, each tensor-parallel rank has the gradient of norms, row-parallel biases and position
    embeddings only for its slice of the sequence. Sum the slices, in one flat all-reduce."""
    if not tp.slices_sequence:
        return
    gradients = [local_gradient(p) for p in parameters
                 if isinstance(p, DTensor) and isinstance(p.placements[-1], Replicate)]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=tp.group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
