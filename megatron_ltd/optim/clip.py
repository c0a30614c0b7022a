"""The global gradient norm, over parameters that are sharded in different ways."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megatron_ltd.parallel.gradients import local_gradient


def _copies(parameter: nn.Parameter) -> int:
    """How many processes of the parameter's mesh hold the same part of it."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(axis) for axis, placement in enumerate(parameter.placements)
                     if isinstance(placement, Replicate))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients of the model, the same on every process.

    Every process gives the parameters it holds, without the second copy of a tied embedding. Sums are taken in fp64
    so that the norm does not depend on how gradients are sharded.

    Shapes:
        -> scalar fp64
    """
    parameters = list(parameters)
    device = local_gradient(parameters[0]).device if parameters else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        # Row by row in fp32, and fp64 above that: a copy of the whole gradient in fp64 would cost more than the sum.
        rows = torch.linalg.vector_norm(local_gradient(parameter), dim=-1)
        total += torch.linalg.vector_norm(rows, dtype=torch.float64).square() / _copies(parameter)
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place."""
    gradients = [local_gradient(parameter) for parameter in parameters]
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)
