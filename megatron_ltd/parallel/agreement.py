"""Ranks exchange values before they act on them, as JSON rather than pickled objects."""

import json
from typing import Any

import torch
import torch.distributed as dist


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, in rank order; a value is anything JSON can represent.

    Args:
        group: a group that can exchange CPU tensors; None: all ranks.
    """
    data = json.dumps(value, allow_nan=False).encode()
    # With a group, a process that has left it must not assume that it is the only one.
    world = 1 if group is None and not dist.is_initialized() else dist.get_world_size(group)
    if world == 1:
        return [json.loads(data)]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64), group=group)
    longest = max(int(size) for size in sizes)
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(buffers, mine, group=group)
    return [json.loads(buffer[: int(size)].numpy().tobytes()) for buffer, size in zip(buffers, sizes, strict=True)]


def disagreements(values: list[dict[str, Any]]) -> list[str]:
    """The differences between the ranks' flat dictionaries: one line per key, ranks with equal values grouped."""
    if len({json.dumps(value, sort_keys=True) for value in values}) == 1:
        return []  # the usual case, in which thousands of ranks need not be compared key by key
    lines = []
    for key in sorted(set().union(*values)):
        ranks_of: dict[str, list[int]] = {}
        for rank, value in enumerate(values):
            ranks_of.setdefault(json.dumps(value.get(key)), []).append(rank)
        if len(ranks_of) > 1:
            sides = "; ".join(f"{text} on rank {_ranks(ranks)}" for text, ranks in ranks_of.items())
            lines.append(f"{key}: {sides}")
    return lines


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} and {len(ranks) - 1} others"
