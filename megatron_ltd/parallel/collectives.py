"""Tensor-parallel communication: raw collectives, and the conjugate pairs that autograd needs.

A tensor-parallel region lies between `enter` and `exit` (f and g of https://arxiv.org/abs/1909.08053, section 3):

                                         forward           backward
    without sequence parallelism
        enter                            identity          all-reduce
        exit                             all-reduce        identity
    with (https://arxiv.org/abs/2205.05198, section 4.2)
        enter                            all-gather        reduce-scatter
        exit                             reduce-scatter    all-gather

Sequence dims come first, so that a slice of the sequence is contiguous. A group of one does nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Renamed in torch 2.12, where the old names warn at every call.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """The reduction over the group, as a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=op, group=group)
    return x


def all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The concatenation of the ranks' tensors. Shapes: [s/t, ...] -> [s, ...]"""
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    _all_gather(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's slice of the sum. Shapes: [s, ...] -> [s/t, ...]"""
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


Pending = Callable[[], torch.Tensor]
"""Waits for a collective, on an accelerator on its stream, and gives the result."""


def start_all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin to overwrite x with the sum over the group."""
    return _pending(dist.all_reduce(x, group=group, async_op=True), x)


def start_all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin `all_gather`."""
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    return _pending(_all_gather(out, x.contiguous(), group=group, async_op=True), out)


def start_reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin `reduce_scatter`."""
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    return _pending(_reduce_scatter(out, x.contiguous(), group=group, async_op=True), out)


def _pending(work: dist.Work, out: torch.Tensor) -> Pending:
    def finished() -> torch.Tensor:
        work.wait()
        return out

    return finished


def exchange(outgoing: Sequence[tuple[int, torch.Tensor]], incoming: Sequence[tuple[int, torch.Tensor]],
             like: torch.Tensor) -> None:
    """Send tensors and receive others in one all-to-all over all ranks of the run.

    Sender and receiver must list the tensors between them in the same order.

    Args:
        outgoing: tensors and the ranks they go to.
        incoming: tensors to fill and the ranks they come from.
        like: a tensor with the dtype and device of all of them.
    """
    if dist.get_world_size() == 1:
        for (_, source), (_, target) in zip(outgoing, incoming, strict=True):
            target.copy_(source)
        return
    outgoing, incoming = (sorted(tensors, key=lambda item: item[0]) for tensors in (outgoing, incoming))
    sent = torch.cat([like.new_empty(0), *(tensor.flatten() for _, tensor in outgoing)])
    received = like.new_empty(sum(tensor.numel() for _, tensor in incoming))
    dist.all_to_all_single(received, sent, _numbers_by_rank(incoming), _numbers_by_rank(outgoing))
    parts = received.split([tensor.numel() for _, tensor in incoming])
    for (_, target), part in zip(incoming, parts, strict=True):
        target.copy_(part.view(target.shape))


def _numbers_by_rank(tensors: Sequence[tuple[int, torch.Tensor]]) -> list[int]:
    counts = [0] * dist.get_world_size()
    for rank, tensor in tensors:
        counts[rank] += tensor.numel()
    return counts


class _CopyThenReduceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _ReduceThenCopyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _GatherThenScatterGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter(grad, ctx.group), None


class _ScatterThenGatherGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(grad, ctx.group), None


@dataclass(eq=False)
class TensorParallel:
    """The tensor-parallel axis, as layers see it.

    Args:
        mesh: one-dimensional device mesh of the ranks that share a layer.
        sequence_parallel: outside the regions, each rank holds a slice of the sequence.
    """

    mesh: DeviceMesh
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def slices_sequence(self) -> bool:
        return self.sequence_parallel and self.size > 1

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Let each rank hold the whole sequence meanwhile: for passes over fewer tokens than there are ranks. Their
        results are the same; gradients are not synchronised for it."""
        sliced, self.sequence_parallel = self.sequence_parallel, False
        try:
            yield
        finally:
            self.sequence_parallel = sliced

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Enter a tensor-parallel region. Shapes: [s, ...], or [s/t, ...] with sequence parallelism -> [s, ...]"""
        if self.size == 1:
            return x
        function = _GatherThenScatterGradient if self.sequence_parallel else _CopyThenReduceGradient
        return function.apply(x, self.group)

    def whole_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """All positions, for a region in which each process reads its own share. Shapes: [s, ...] or [s/t, ...] -> [s,
        ...]"""
        return self.enter(x) if self.slices_sequence else x

    def exit(self, x: torch.Tensor) -> torch.Tensor:
        """Leave a region with the sum of the ranks' parts. Shapes: [s, ...] -> [s, ...], or [s/t, ...]"""
        if self.size == 1:
            return x
        function = _ScatterThenGatherGradient if self.sequence_parallel else _ReduceThenCopyGradient
        return function.apply(x, self.group)

    def gather_shards(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter whose first dim is sharded, whole inside a region; the processes' gradients are summed. Shapes:
        [o/t, ...] -> [o, ...]"""
        return parameter if self.size == 1 else _GatherThenScatterGradient.apply(parameter, self.group)

    def sum_of_shards(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what the processes have of a value inside a region, which all of them go on with."""
        if self.size == 1:
            return x
        return _CopyThenReduceGradient.apply(_ReduceThenCopyGradient.apply(x, self.group), self.group)

    def shared_inside(self, parameter: torch.Tensor) -> torch.Tensor:
        """A replicated parameter that is used inside a region, where each process has a part of its gradient. With
        sequence parallelism the parts are summed together with those of other replicated parameters."""
        if self.size == 1 or self.sequence_parallel:
            return parameter
        return _CopyThenReduceGradient.apply(parameter, self.group)

    def sequence_span(self, sequence_tokens: int) -> tuple[int, int]:
        """First position, and number of positions, that this process holds between regions."""
        if not self.slices_sequence:
            return 0, sequence_tokens
        share = sequence_tokens // self.size
        return self.mesh.get_local_rank() * share, share

    def shard_span(self, count: int) -> tuple[int, int]:
        """First item, and number of items, of `count` items (rows, heads) that are sharded over the axis."""
        share = count // self.size
        return self.mesh.get_local_rank() * share, share
