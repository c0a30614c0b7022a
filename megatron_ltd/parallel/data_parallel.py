"""Data parallelism: FSDP2 over the two data axes of the mesh.

With the sharding axis of size one this is plain replication with one gradient all-reduce; with the replicating axis of
size one, ZeRO-2 or ZeRO-3 (https://arxiv.org/abs/1910.02054). In every case the optimizer sees fp32 parameters and
gradients; in half precision, FSDP2 casts what the layers compute with.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_ltd.parallel.mesh import Mesh

_COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of activations."""
    return _COMPUTE_DTYPES[precision]


def is_needed(mesh: Mesh, precision: str) -> bool:
    """One data-parallel rank in fp32 has nothing to shard, reduce or cast."""
    return mesh.dp_size > 1 or precision != "fp32"


def shard(module: nn.Module, mesh: Mesh, *, precision: str, reshard_after_forward: bool) -> None:
    """Shard or replicate the parameters of `module` that no inner call has taken yet; in place.

    Args:
        reshard_after_forward: free the gathered parameters between forward and backward (ZeRO-3).
    """
    if not is_needed(mesh, precision):
        return
    dtype = compute_dtype(precision)
    # Inputs are already of the compute dtype, and a cast would round what is not a hidden state.
    policy = MixedPrecisionPolicy(param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    fully_shard(module, mesh=mesh.data, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    assert isinstance(module, FSDPModule)
    # Gradients are summed; the loss already carries one over the global number of tokens.
    module.set_force_sum_reduction_for_comms(True)
    if mesh.dp_size > 1:  # one rank divides by one as it is; told to, it makes another copy of all gradients
        module.set_gradient_divide_factor(1.0)


def gather_once(modules: Iterable[nn.Module]) -> None:
    """Before a step that leaves one of these modules out: FSDP2's backward pass looks at the gathered parameters of
    every module, and fails where there have never been any."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def reshard(modules: Iterable[nn.Module]) -> None:
    """After a forward pass without a backward pass, put the sharded parameters back in place: until then `parameters()`
    are gathered copies, and what is written to them is lost."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
