"""Tensors that are made once in a group and arrive everywhere."""

from datetime import timedelta
from functools import partial

import pytest
import torch

from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.parallel.turns import Turns, balanced
from tests.gloo import run_ranks

SIZES = [5, 40, 1, 7, 7, 3, 30, 2, 2]


def filled(rank: int, ranks: int, tp: int) -> tuple[list[int], list[torch.Tensor]]:
    """Which tensors this process made, and its parts of all of them: of each the last numbers, as many as its tensor
    rank and one."""
    mesh = build_mesh("cpu", pp=1, dp=ranks // tp, tp=tp, shard_parameters=True, timeout=timedelta(seconds=60))
    made: list[int] = []

    def make(number: int) -> torch.Tensor:
        made.append(number)
        return torch.arange(SIZES[number]) + 100.0 * number

    turns = Turns(mesh.data_group, [partial(make, number) for number in range(len(SIZES))], SIZES)
    length = mesh.tp_rank + 1
    parts = [torch.empty(min(size, length)) for size in SIZES]
    for part in parts:
        turns.fill(part, lambda whole: whole[-length:])
    return made, parts


@pytest.mark.parametrize("ranks, tp", [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_a_group_makes_each_tensor_once(ranks: int, tp: int) -> None:
    found = run_ranks(filled, ranks, tp)
    for tp_rank in range(tp):
        made = [number for numbers, _ in found[tp_rank::tp] for number in numbers]
        assert sorted(made) == list(range(len(SIZES)))
    for rank, (_, parts) in enumerate(found):
        for number, (size, part) in enumerate(zip(SIZES, parts, strict=True)):
            whole = torch.arange(size) + 100.0 * number
            assert torch.equal(part, whole[-min(size, rank % tp + 1):])


def failing(rank: int, ranks: int) -> str:
    mesh = build_mesh("cpu", pp=1, dp=ranks, tp=1, shard_parameters=True, timeout=timedelta(seconds=60))

    def make() -> torch.Tensor:
        raise MemoryError("too little of it")

    try:
        Turns(mesh.data_group, [make], [1.0]).fill(torch.empty(1), lambda whole: whole)
    except MemoryError as error:
        return str(error)
    return ""


def test_what_fails_in_the_background_fails_where_it_is_asked_for() -> None:
    assert run_ranks(failing, 1) == ["too little of it"]


def test_work_is_balanced() -> None:
    work = [3.0, 1.0, 4.0, 4.0] * 12  # a layer's matrices, in units of hidden size squared
    for shares in (1, 2, 4, 6):
        loads = [0.0] * shares
        for cost, share in zip(work, balanced(work, shares), strict=True):
            loads[share] += cost
        assert max(loads) <= sum(work) / shares + max(work)
