"""The global gradient norm over parameters that are sharded in different ways.

Nothing is read from the device: the norm is a tensor, and so is what gradients are scaled by.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megatron_ltd.parallel.gradients import local_gradient

_SLAB_NUMBERS = {False: 1 << 18, True: 1 << 26}
"""Numbers summed at once: on a CPU, and on a GPU, where each slab costs a few kernel launches."""


def _copies(parameter: nn.Parameter) -> int:
    """Number of processes in the parameter's mesh that hold the same shard of it."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(axis) for axis, placement in enumerate(parameter.placements)
                     if isinstance(placement, Replicate))


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients of the model, the same on every process.

    Every process passes the parameters it holds, without the second copy of a tied embedding. Sums are in fp64 so that
    the norm does not depend on how gradients are sharded.

    Shapes:
        -> scalar fp64
    """
    parameters = list(parameters)
    device = local_gradient(parameters[0]).device if parameters else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    slabs: defaultdict[int, list[torch.Tensor]] = defaultdict(list)  # by the number of processes that hold them
    for parameter in parameters:
        # On a CPU torch makes an fp64 copy of its input: that of a slab stays in cache.
        slabs[_copies(parameter)] += local_gradient(parameter).flatten().split(_SLAB_NUMBERS[device.type == "cuda"])
    for copies, gradients in slabs.items():
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
        total += torch.stack(norms).square().sum() / copies
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply all gradients in place. Shapes: factor scalar fp32"""
    gradients = [local_gradient(parameter) for parameter in parameters]
    if gradients:
        torch._foreach_mul_(gradients, factor)
