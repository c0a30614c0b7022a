"""Gradient sums that neither autograd nor FSDP2 computes: of tied copies, and of parameters whose gradients sequence
parallelism splits."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megatron_ltd.parallel.collectives import TensorParallel

_SLAB_NUMBERS = 1 << 24
"""Of an embedding's gradient, which are exchanged at a time, so that little memory is needed."""


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


def reduce_tied(embedding: nn.Parameter | None, head: nn.Parameter | None, pipeline: dist.ProcessGroup) -> None:
    """Set the gradients of both copies of a tied embedding to their sum.

    Equal copies with equal gradients and optimizer state stay equal.

    Args:
        embedding, head: the copies this process holds.
        pipeline: its first process holds the first copy and its last process the second one, unless one holds both.
    """
    if embedding is not None and head is not None:
        total = local_gradient(embedding) + local_gradient(head)
        local_gradient(embedding).copy_(total)
        local_gradient(head).copy_(total)
    elif embedding is not None or head is not None:
        parameter, other = (embedding, dist.get_world_size(pipeline) - 1) if embedding is not None else (head, 0)
        assert parameter is not None
        _add_from(other, local_gradient(parameter), pipeline)


def _add_from(other: int, gradient: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Send a gradient to another process of the group, and add what that one sends.

    An all-reduce would need a group for each pair, and all processes of a run take part in making every one of them:
    minutes, for a thousand processes.
    """
    for slab in gradient.view(-1).split(_SLAB_NUMBERS) if gradient.numel() else ():
        received = torch.empty_like(slab)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, slab, group=group, group_peer=other),
                                        dist.P2POp(dist.irecv, received, group=group, group_peer=other)])
        for work in works:
            work.wait()
        slab.add_(received)


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
