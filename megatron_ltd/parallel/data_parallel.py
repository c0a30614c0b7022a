"""Data parallelism: FSDP2 over the two data axes of the mesh.

With the sharding axis of size one this is plain replication with one gradient all-reduce; with the replicating axis of
size one, ZeRO-2 or ZeRO-3 (https://arxiv.org/abs/1910.02054). In every case the optimizer sees fp32 parameters and
gradients; in half precision, FSDP2 casts parameters to the compute dtype.

    between microbatches, whole   gradients    parameters
    replication                   yes          yes
    ZeRO-2                        no           yes
    ZeRO-3                        no           no

So under ZeRO every microbatch reduces its gradients, layer by layer during the backward pass; a replica reduces them
during the last one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from megatron_ltd.parallel.mesh import Mesh

_COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of activations."""
    return _COMPUTE_DTYPES[precision]


def is_needed(mesh: Mesh, precision: str) -> bool:
    """One data-parallel rank in fp32 has nothing to shard, reduce or cast."""
    return mesh.dp_size > 1 or precision != "fp32"


def shard(module: nn.Module, mesh: Mesh, *, precision: str, reshard_after_forward: bool) -> None:
    """Shard or replicate, in place, those parameters of `module` that no call on an inner module has handled yet.

    Args:
        reshard_after_forward: free the gathered parameters between forward and backward (ZeRO-3).
    """
    if not is_needed(mesh, precision):
        return
    dtype = compute_dtype(precision)
    # Inputs already have the compute dtype, and a cast would round inputs that are not hidden states.
    policy = MixedPrecisionPolicy(param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    fully_shard(module, mesh=mesh.data, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    assert isinstance(module, FSDPModule)
    # Gradients are summed; the loss is already divided by the global number of tokens.
    module.set_force_sum_reduction_for_comms(True)
    if mesh.dp_size > 1:  # one rank divides by one anyway; setting the factor makes another copy of all gradients
        module.set_gradient_divide_factor(1.0)
    if mesh.world.device_type == "cpu":  # collectives are synchronous, so there is nothing to overlap them with
        module.set_modules_to_backward_prefetch([module])
        module._set_unshard_async_op(True)  # otherwise the last layer's buffer is kept for the next one's gathering
        module.set_custom_reduce_scatter(_FreeingReduceScatter())


class _FreeingReduceScatter(DefaultReduceScatter):
    """Frees its input at once; FSDP2 would keep it for a stream that reads it in the background."""

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        work = super().__call__(output_tensor, input_tensor, *args, **kwargs)
        input_tensor.untyped_storage().resize_(0)
        return work


def before_backward(module: nn.Module, sharding: str, *, last: bool) -> None:
    """Prepare the backward pass of a microbatch.

    Args:
        module: a stage, whose inner modules follow it.
        sharding: a value of --data-parallel-sharding-strategy.
        last: whether this is the last backward pass of the step.
    """
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(last)
        module.set_requires_gradient_sync(last or sharding != "no_shard")
        module.set_reshard_after_backward(last or sharding == "optim_grads_params")


def gather_in_backward(module: nn.Module, wanted: bool) -> None:
    """Whether the module's backward pass needs its gathered parameters. FSDP2 would gather those of a module without a
    backward pass as well, and keep them until the end of the step."""
    if isinstance(module, FSDPModule):
        module.set_unshard_in_backward(wanted)


def gather_once(modules: Iterable[nn.Module]) -> None:
    """Prepare a step that skips one of these modules: FSDP2's backward pass accesses the gathered parameters of every
    module, and fails if they have never been gathered."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def reshard(modules: Iterable[nn.Module]) -> None:
    """Restore the sharded parameters after a forward pass without a backward pass: until then `parameters()` returns
    gathered copies, and writes to them are lost."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
