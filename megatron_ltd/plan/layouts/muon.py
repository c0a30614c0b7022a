"""What Muon's update takes (`optim/muon.py`): moments, products, and the exchange of whole matrices, by arithmetic."""

import heapq
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.flops import newton_schulz_flops
from megatron_ltd.model.arithmetic.shapes import layer_matrices, parameter_shapes
from megatron_ltd.plan.derived import muon_precision
from megatron_ltd.plan.layouts.activations import DTYPE_BYTES
from megatron_ltd.plan.layouts.layout import Layout

MOMENT_BYTES = 4
"""Of a number in a matrix that Muon updates; AdamW, which updates all others, has 8."""


class Owned(NamedTuple):
    """The most that one process of a stage does for the others of it, in one iteration and in all.

    Args:
        flops: of one Newton-Schulz iteration.
        numbers: of whole matrices.
        largest: of these, the numbers of one.
    """

    flops: int
    numbers: int
    largest: int


def owned(config: RunConfig, layers: int, members: int) -> Owned:
    """Of so many layers' matrices, each of which one of the members makes whole.

    Args:
        layers: of a process of the pipeline.
        members: processes that share these layers, replicas included.
    """
    return _owned(config.model, config.optimizer.muon_split_qkv, layers, members)


@lru_cache(maxsize=4096)
def _owned(model: ModelConfig, split_qkv: bool, layers: int, members: int) -> Owned:
    """By the rule of `parallel/owners.py`: the largest first, each to the process with the least work so far."""
    shapes = parameter_shapes(replace(model, num_layers=1))
    matrices = sorted(((newton_schulz_flops(shapes[name], rows if split_qkv else shapes[name][:1]), prod(shapes[name]))
                       for name, rows in ((f"layers.0.{name}", rows) for name, rows in layer_matrices(model).items())),
                      reverse=True)
    largest = max(numbers for _, numbers in matrices)
    if members >= layers * len(matrices):
        return Owned(matrices[0][0], largest, largest)
    loads = [(0, 0)] * members
    for flops, numbers in matrices:
        for _ in range(layers):
            least = loads[0]
            heapq.heapreplace(loads, (least[0] + flops, least[1] + numbers))
    return Owned(max(flops for flops, _ in loads), max(numbers for _, numbers in loads), largest)


def iterated_bytes(config: RunConfig) -> int:
    """Of a number in the iterations."""
    return DTYPE_BYTES[muon_precision(config)]


def exchanged_numbers(layout: Layout, local: int, whole: int) -> tuple[int, int]:
    """The most numbers that a process sends or receives while matrices are gathered, and while what was made of them is
    sent back, to replicas too.

    Args:
        local: of the matrices' shards on a process.
        whole: of the matrices that a process owns.
    """
    copies = layout.dp // layout.shares
    return max(local, whole), max(local, copies * whole)


def update_bytes(config: RunConfig, layout: Layout, layers: int, local: int) -> int:
    """Bytes that are alive besides weights, gradients and moments: at the gathering or the sending back, or, where
    nothing is sent, in the last iterations, which hold a matrix twice beside what becomes of it.

    Args:
        layers: of the process.
        local: numbers of the matrices' shards on it.
    """
    _, whole, largest = owned(config, layers, layout.tp * layout.dp)
    iterated = iterated_bytes(config)
    if layout.world_size == 1:
        return 4 * (local + whole) + (4 + 2 * iterated) * largest
    cast = iterated * local if iterated < 4 else 0
    copies = layout.dp // layout.shares
    gathering = cast + iterated * (local + 2 * whole)  # sent, received, and whole
    returning = 4 * (whole + copies * whole + local)
    return 4 * local + max(gathering, returning)
