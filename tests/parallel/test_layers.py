"""Tensor-parallel layers against the serial ones of torch, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ltd.parallel.gradients import reduce_replicated
from megatron_ltd.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from tests.gloo import run_ranks
from tests.parallel.sharded import fill, noise, tensor_parallel, whole_gradients

SEQUENCE, SAMPLES, WIDTH, INNER, ROWS = 8, 3, 6, 12, 20
LAYOUTS = pytest.mark.parametrize(
    ("ranks", "sequence_parallel"), [(1, False), (1, True), (2, False), (2, True), (4, False), (4, True)])
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Pair(nn.Module):
    """A region: two column-parallel layers that read one input, then a row-parallel one."""

    def __init__(self, ranks: int, sequence_parallel: bool, bias: bool):
        super().__init__()
        self.tp = tensor_parallel(ranks, sequence_parallel)
        self.first = ColumnParallelLinear(WIDTH, INNER, self.tp, bias=bias)
        self.gate = ColumnParallelLinear(WIDTH, INNER, self.tp, bias=bias)
        self.last = RowParallelLinear(INNER, WIDTH, self.tp, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tp.enter(x)
        return self.last(torch.tanh(self.first(x)) * self.gate(x))


def pair_on_ranks(rank: int, ranks: int, sequence_parallel: bool, bias: bool) -> Result:
    """This rank's output, and all gradients, the input's among them."""
    pair = Pair(ranks, sequence_parallel, bias)
    fill(pair)
    first, count = pair.tp.sequence_span(SEQUENCE)
    x = noise(SEQUENCE, SAMPLES, WIDTH)[first:first + count].requires_grad_()
    y = pair(x)
    assert y.shape == x.shape
    (y * noise(SEQUENCE, SAMPLES, WIDTH, seed=1)[first:first + count]).sum().backward()
    reduce_replicated(pair.parameters(), pair.tp)
    assert x.grad is not None
    return y.detach(), whole_gradients(pair) | {"input": x.grad}


@LAYOUTS
@pytest.mark.parametrize("bias", [True, False])
def test_column_then_row_is_a_serial_pair(ranks: int, sequence_parallel: bool, bias: bool) -> None:
    names = ["first.weight", "first.bias", "gate.weight", "gate.bias", "last.weight", "last.bias"]
    shapes = {"first": (INNER, WIDTH), "gate": (INNER, WIDTH), "last": (WIDTH, INNER)}
    values: dict[str, torch.Tensor] = {}
    for name in names if bias else names[::2]:
        layer, kind = name.split(".")
        shape = shapes[layer] if kind == "weight" else shapes[layer][:1]
        values[name] = noise(*shape, seed=10 + len(values)).requires_grad_()
    x = noise(SEQUENCE, SAMPLES, WIDTH).requires_grad_()
    inner = torch.tanh(F.linear(x, values["first.weight"], values.get("first.bias")))
    inner = inner * F.linear(x, values["gate.weight"], values.get("gate.bias"))
    y = F.linear(inner, values["last.weight"], values.get("last.bias"))
    (y * noise(SEQUENCE, SAMPLES, WIDTH, seed=1)).sum().backward()
    results: list[Result] = run_ranks(pair_on_ranks, ranks, sequence_parallel, bias)
    slices = ranks if sequence_parallel else 1
    for rank, (output, gradients) in enumerate(results):
        mine = slice(*(SEQUENCE // slices * (rank % slices + i) for i in (0, 1)))
        torch.testing.assert_close(output, y[mine].detach(), rtol=1e-12, atol=1e-12)
        assert x.grad is not None
        torch.testing.assert_close(gradients.pop("input"), x.grad[mine], rtol=1e-12, atol=1e-12)
        assert gradients.keys() == values.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, values[name].grad, rtol=1e-12, atol=1e-12)


def embedding_on_ranks(rank: int, ranks: int, sequence_parallel: bool) -> Result:
    tp = tensor_parallel(ranks, sequence_parallel)
    embedding = VocabParallelEmbedding(ROWS, WIDTH, tp)
    fill(embedding)
    y = embedding(tokens())
    first, count = tp.sequence_span(SEQUENCE)
    (y * noise(SEQUENCE, SAMPLES, WIDTH, seed=1)[first:first + count]).sum().backward()
    return y.detach(), whole_gradients(embedding)


def tokens() -> torch.Tensor:
    """Some ids twice, some never, and those at the borders of the shards."""
    ids = torch.randint(0, ROWS - 3, (SEQUENCE, SAMPLES), generator=torch.Generator().manual_seed(2))
    ids[0, :] = torch.tensor([0, ROWS // 2 - 1, ROWS // 2])
    ids[-1, :] = torch.tensor([ROWS // 4, ROWS - 1, ROWS // 4 - 1])
    return ids


@LAYOUTS
def test_the_vocabulary_parallel_embedding_is_the_serial_one(ranks: int, sequence_parallel: bool) -> None:
    table = noise(ROWS, WIDTH, seed=10).requires_grad_()
    y = F.embedding(tokens(), table)
    (y * noise(SEQUENCE, SAMPLES, WIDTH, seed=1)).sum().backward()
    results: list[Result] = run_ranks(embedding_on_ranks, ranks, sequence_parallel)
    slices = ranks if sequence_parallel else 1
    for rank, (output, gradients) in enumerate(results):
        mine = slice(*(SEQUENCE // slices * (rank % slices + i) for i in (0, 1)))
        assert torch.equal(output, y[mine].detach())  # a sum of one row and zeros rounds nothing
        torch.testing.assert_close(gradients["weight"], table.grad, rtol=1e-12, atol=1e-12)


def replicated_gradients_before_their_sum(rank: int, ranks: int) -> list[torch.Tensor]:
    """The bias of a row-parallel layer, under sequence parallelism, before and after the slices are added up."""
    pair = Pair(ranks, True, bias=True)
    fill(pair)
    first, count = pair.tp.sequence_span(SEQUENCE)
    pair(noise(SEQUENCE, SAMPLES, WIDTH)[first:first + count]).sum().backward()
    bias = pair.last.bias
    assert bias is not None and isinstance(bias.grad, DTensor)
    before = bias.grad.to_local().clone()
    reduce_replicated(pair.parameters(), pair.tp)
    return [before, bias.grad.to_local()]


def test_each_rank_has_the_replicated_gradients_of_its_slice_until_they_are_added_up() -> None:
    for before, after in run_ranks(replicated_gradients_before_their_sum, 2):
        assert torch.equal(before, torch.full((WIDTH,), SEQUENCE / 2 * SAMPLES, dtype=torch.float64))
        assert torch.equal(after, torch.full((WIDTH,), float(SEQUENCE * SAMPLES), dtype=torch.float64))
