"""Sums of gradients that are left to take after the backward pass."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_ltd.parallel import gradients
from megatron_ltd.parallel.gradients import local_gradient, missing_gradients, reduce_replicated, reduce_tied
from megatron_ltd.parallel.layers import local, sharded_parameter
from tests.gloo import run_ranks
from tests.parallel.sharded import fill, noise, tensor_parallel, whole_gradients


def with_gradient(gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    return parameter


def tied_over_three_ranks(rank: int, ranks: int) -> list[float]:
    """The first rank holds the embedding, the last the head, and the one between neither."""
    parameter = with_gradient(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * 10 ** rank)
    with mock.patch.object(gradients, "_SLAB_NUMBERS", 3), \
            mock.patch.object(dist, "all_reduce", side_effect=AssertionError("no group has just these processes")):
        reduce_tied(parameter if rank == 0 else None, parameter if rank == 2 else None, dist.group.WORLD)
    assert parameter.grad is not None
    return parameter.grad.flatten().tolist()


def test_the_copies_of_a_tied_embedding_get_the_sum() -> None:
    total = [101.0, 202.0, 303.0, 404.0]
    assert run_ranks(tied_over_three_ranks, 3) == [total, [10.0, 20.0, 30.0, 40.0], total]


def without_rows(rank: int, ranks: int) -> list[int]:
    """A shard that has no rows, since there are more processes than rows."""
    parameter = with_gradient(torch.zeros(0, 2))
    reduce_tied(parameter if rank == 0 else None, parameter if rank == 1 else None, dist.group.WORLD)
    assert parameter.grad is not None
    return list(parameter.grad.shape)


def test_a_shard_without_rows_has_nothing_to_add() -> None:
    assert run_ranks(without_rows, 2) == [[0, 2], [0, 2]]


def test_two_copies_in_one_process_get_the_sum() -> None:
    embedding, head = with_gradient(torch.tensor([1.0, 2.0])), with_gradient(torch.tensor([30.0, 40.0]))
    reduce_tied(embedding, head, mock.Mock())
    for parameter in (embedding, head):
        assert parameter.grad is not None and parameter.grad.tolist() == [31.0, 42.0]
    assert embedding.grad is not head.grad


def tied_and_sharded(rank: int, ranks: int) -> list[float]:
    """Both copies are sharded in the same way, two ranks for each."""
    tp_rank, stage = rank % 2, rank // 2
    module = nn.Module()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    tp = type(tensor_parallel(4))(mesh["tp"])
    module.table = sharded_parameter((4, 1), dist.tensor.Shard(0), tp)
    fill(module)
    (local(module.table) * noise(4, 1, seed=stage)[2 * tp_rank:2 * tp_rank + 2]).sum().backward()
    reduce_tied(module.table if stage == 0 else None, module.table if stage == 1 else None, mesh["pp"].get_group())
    return whole_gradients(module)["table"].flatten().tolist()


def test_sharded_copies_get_the_sum_of_their_shards() -> None:
    expected = (noise(4, 1, seed=0) + noise(4, 1, seed=1)).flatten().tolist()
    assert run_ranks(tied_and_sharded, 4) == [pytest.approx(expected)] * 4


def replicated_sums(rank: int, ranks: int, sequence_parallel: bool) -> dict[str, list[float]]:
    tp = tensor_parallel(ranks, sequence_parallel)
    module = nn.Module()
    module.norm = sharded_parameter((3,), dist.tensor.Replicate(), tp)
    module.column = sharded_parameter((4, 2), dist.tensor.Shard(0), tp)
    module.position = sharded_parameter((2, 2), dist.tensor.Replicate(), tp)
    fill(module)
    for number, parameter in enumerate(module.parameters()):
        (local(parameter) * (number + 1) * 10 ** rank).sum().backward()
    reduce_replicated(module.parameters(), tp)
    return {name: sorted(set(local_gradient(p).flatten().tolist())) for name, p in module.named_parameters()}


def test_only_replicated_parameters_are_added_up_and_only_with_sequence_parallelism() -> None:
    own = [1.0, 10.0]
    assert run_ranks(replicated_sums, 2, True) == [
        {"norm": [11.0], "column": [2 * own[rank]], "position": [33.0]} for rank in (0, 1)]
    assert run_ranks(replicated_sums, 2, False) == [
        {"norm": [own[rank]], "column": [2 * own[rank]], "position": [3 * own[rank]]} for rank in (0, 1)]


def test_parameters_without_a_gradient_are_named() -> None:
    with_one = with_gradient(torch.ones(2))
    without = nn.Parameter(torch.ones(2))
    assert missing_gradients([("a", with_one), ("b", without), ("c", without)]) == ["b", "c"]
    assert missing_gradients([("a", with_one)]) == []
