"""Modules of sharded parameters, filled from whole tensors, and what is whole again of their gradients."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_ltd.parallel.collectives import TensorParallel


def tensor_parallel(world_size: int, sequence_parallel: bool = False) -> TensorParallel:
    return TensorParallel(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), sequence_parallel)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The same numbers on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fill(module: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 10) -> None:
    """Replace every parameter by its shard of whole random numbers; the first one has `noise(..., seed=seed)`."""
    for number, (name, parameter) in enumerate(list(module.named_parameters())):
        assert isinstance(parameter, DTensor)
        owner, _, last = name.rpartition(".")
        whole = noise(*parameter.shape, seed=seed + number, dtype=dtype)
        shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        setattr(module.get_submodule(owner), last, nn.Parameter(shard))


def whole_gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    gradients = {}
    for name, parameter in module.named_parameters():
        assert isinstance(parameter.grad, DTensor), f"{name} has no gradient"
        gradients[name] = parameter.grad.full_tensor().clone()  # of a replica it is the gradient itself
    return gradients
