"""A small sharded model for checkpoint tests: every kind of placement, on any mesh of dp and tp."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron_ltd.checkpoint.writer import CheckpointWriter

COUNTERS = {"consumed_samples": 640, "loss_scale": 65536.0}
CONFIG: dict[str, Any] = {"model": {"num_layers": 2}, "training": {"bf16": True}}

PARAMETERS = {
    "qkv": ((8, 6), Shard(0), torch.float32),
    "proj": ((6, 8), Shard(1), torch.float32),
    "norm": ((5,), Replicate(), torch.float32),
    "rows_uneven": ((5, 4), Shard(0), torch.bfloat16),
    "columns_uneven": ((3, 7), Shard(1), torch.float32),
    "bias": ((7,), Shard(0), torch.bfloat16),
    "fewer_rows_than_ranks": ((3, 2), Shard(0), torch.float16),
    "one_number": ((1,), Replicate(), torch.float64),
    "cube": ((4, 3, 5), Shard(0), torch.float32),
}
"""name -> global shape, placement over tp, dtype"""


def expected(name: str) -> torch.Tensor:
    """The whole tensor, on every rank of every layout the same."""
    shape, _, dtype = PARAMETERS[name]
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sharded(layout: tuple[int, ...], fsdp: bool = True, fill: bool = True) -> dict[str, torch.Tensor]:
    """The model's tensors on this rank.

    Args:
        layout: (dp, tp), or (replicas, dp, tp) for hybrid sharding.
        fsdp: shard over dp too; without it dp replicates.
        fill: with the expected values rather than zeros.
    """
    names = ("replicas", "dp", "tp")[-len(layout):]
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=names)
    # A module for each dtype: FSDP wants one dtype in a group.
    model = nn.ModuleDict({str(dtype).replace(".", "_"): nn.Module() for _, _, dtype in PARAMETERS.values()})
    for name, (_, placement, dtype) in PARAMETERS.items():
        full = expected(name) if fill else torch.zeros_like(expected(name))
        local = distribute_tensor(full, mesh["tp"], [placement], src_data_rank=None)
        setattr(model[str(dtype).replace(".", "_")], name, nn.Parameter(local))
    if fsdp:
        for module in model.values():
            fully_shard(module, mesh=mesh[names[:-1]])
    return {"model." + name.split(".")[1]: parameter.data for name, parameter in model.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differing(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit as expected."""
    return [name for name, tensor in tensors.items()
            if not torch.equal(whole(tensor), expected(name.removeprefix("model.")))]


def plain(fill: bool = True) -> dict[str, torch.Tensor]:
    """The model's tensors whole, in one process."""
    return {f"model.{name}": expected(name) if fill else torch.zeros_like(expected(name)) for name in PARAMETERS}


def save_plain(save_dir: Path, step: int, tensors: dict[str, torch.Tensor] | None = None, **options: Any) -> Path:
    """Save from one process and return the checkpoint's folder."""
    CheckpointWriter(save_dir, None, **options).save(
        step, plain() if tensors is None else tensors, config=CONFIG, counters=COUNTERS)
    return save_dir / f"iter_{step:07d}"
