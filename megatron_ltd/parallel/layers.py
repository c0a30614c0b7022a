"""Linear layers and the word embedding, sharded over the tensor-parallel axis.

Every parameter is a DTensor on that axis: its placement is stated once, here, and read by clipping, checkpoints and
initialisation. `forward` works on the local shard. The first linear of a region is column-parallel, the last
row-parallel; the region's communication is `TensorParallel.enter` and `.exit` (https://arxiv.org/abs/1909.08053).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.entrance import Linear


def sharded_parameter(shape: tuple[int, ...], placement: Placement, tp: TensorParallel) -> nn.Parameter:
    """A parameter of global `shape` without storage; `megatron_ltd.model.init` allocates and fills it."""
    local = list(shape)
    if isinstance(placement, Shard):
        local[placement.dim] //= tp.size
    data = torch.empty(local, device="meta")
    stride = torch.empty(shape, device="meta").stride()
    return nn.Parameter(DTensor.from_local(data, tp.mesh, [placement], run_check=False, shape=torch.Size(shape),
                                           stride=stride))


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The shard this process holds, with gradients flowing to the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_part(full: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """The local shard of `parameter` if its global value is `full`."""
    (placement,) = parameter.placements
    if not isinstance(placement, Shard):
        return full
    mesh = parameter.device_mesh
    return full.chunk(mesh.size(), dim=placement.dim)[mesh.get_local_rank()]


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features, the rows of W, sharded; computed by `entrance.products` on entering the
    tensor-parallel region, once for all layers that read the same input.

    Args:
        in_features: i, not sharded.
        out_features: o of the whole layer.
    """

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, *, bias: bool):
        super().__init__()
        self.weight = sharded_parameter((out_features, in_features), Shard(0), tp)
        self.bias = sharded_parameter((out_features,), Shard(0), tp) if bias else None

    @property
    def linear(self) -> Linear:
        return local(self.weight), None if self.bias is None else local(self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input features, the columns of W, sharded; leaves the tensor-parallel region.

    Args:
        in_features: i of the whole layer.
        out_features: o, not sharded.

    Shapes:
        x [s, b, i/t] -> [s, b, o], or [s/t, b, o] with sequence parallelism
    """

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, *, bias: bool):
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter((out_features, in_features), Shard(1), tp)
        self.bias = sharded_parameter((out_features,), Replicate(), tp) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))
        y = self.tp.exit(F.linear(x, local(self.weight)))
        return y if self.bias is None else y + local(self.bias)


class ReplicatedLinear(nn.Module):
    """y = x W^T + b, whole on every rank, outside the tensor-parallel regions. Shapes: x [..., i] -> [..., o]"""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, *, bias: bool = True):
        super().__init__()
        self.weight = sharded_parameter((out_features, in_features), Replicate(), tp)
        self.bias = sharded_parameter((out_features,), Replicate(), tp) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


class VocabParallelEmbedding(nn.Module):
    """A table of vectors with its rows sharded. It returns this process's part of a sum: the caller leaves the
    tensor-parallel region, once for all tables, and with the mean of a bag rather than each of its tokens.

    Args:
        rows: v, divisible by t; of a vocabulary with its padding.
        features: h.

    Shapes:
        indices [...] int64 -> [..., h]
    """

    def __init__(self, rows: int, features: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter((rows, features), Shard(0), tp)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        weight = local(self.weight)
        if self.tp.size == 1:
            return F.embedding(indices, weight)
        first, count = self.tp.shard_span(self.weight.shape[0])
        row = indices - first
        elsewhere = (row < 0) | (row >= count)
        return F.embedding(row.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0.0)
