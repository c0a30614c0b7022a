"""Tensor-parallel layers against the serial ones of torch, in float64."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ltd.parallel import collectives
from megatron_ltd.parallel.entrance import kept, products
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
        first, gate = products(kept(x), [self.first.linear, self.gate.linear], self.tp)
        return self.last(torch.tanh(first) * gate)


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


class Order(TorchDispatchMode):
    """Products and collectives in the order in which they are started, and waits for the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].strip("_")
        if name in ("mm", "addmm", "allreduce", "allgather_base", "reduce_scatter_base"):
            self.seen.append(name.removesuffix("_base"))
        return func(*args, **(kwargs or {}))


def order_on_ranks(rank: int, ranks: int, sequence_parallel: bool) -> tuple[list[str], list[int]]:
    """What the backward pass of a region's first products does, and the sizes of what they keep beside weights."""
    pair, kept_sizes, waits = Pair(ranks, sequence_parallel, False), [], collectives._pending
    fill(pair)
    x = noise(pair.tp.sequence_span(SEQUENCE)[1], SAMPLES, WIDTH).requires_grad_()

    def watched(work: dist.Work, out: torch.Tensor) -> collectives.Pending:
        finish = waits(work, out)
        return lambda: order.seen.append("wait") or finish()  # type: ignore[func-returns-value]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept_sizes.append(t.numel()) or t, lambda t: t):
        first, gate = products(kept(x), [pair.first.linear, pair.gate.linear], pair.tp)
    with mock.patch.object(collectives, "_pending", watched), Order() as order:
        (first + gate).sum().backward()
    return order.seen, kept_sizes


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_run_beside_products_and_the_slice_is_kept(sequence_parallel: bool) -> None:
    for order, sizes in run_ranks(order_on_ranks, 2, sequence_parallel):
        whole, weight = SEQUENCE * SAMPLES * WIDTH, INNER // 2 * WIDTH
        if sequence_parallel:  # gathered beside the input's gradient, scattered beside the weights'
            assert order == ["allgather", "mm", "mm", "reduce_scatter", "wait", "mm", "mm", "wait"]
        else:
            assert order == ["mm", "mm", "allreduce", "mm", "mm", "wait"]
        assert sorted(sizes) == sorted([whole // (2 if sequence_parallel else 1), weight, weight])


def parts_of_a_split_pass(rank: int, ranks: int) -> list[list[str]]:
    """The operations of a backward pass for the input, and of one for the weights."""
    pair, x = Pair(ranks, False, False), noise(SEQUENCE, SAMPLES, WIDTH).requires_grad_()
    fill(pair)
    loss = sum(part.sum() for part in products(kept(x), [pair.first.linear, pair.gate.linear], pair.tp))
    assert isinstance(loss, torch.Tensor)
    found = []
    for wanted in ([x], [pair.first.weight, pair.gate.weight]):
        with Order() as order:
            torch.autograd.grad(loss, wanted, retain_graph=True)
        found.append(order.seen)
    return found


def test_a_split_backward_pass_computes_each_product_once() -> None:
    for for_input, for_weights in run_ranks(parts_of_a_split_pass, 2):
        assert for_input == ["mm", "mm", "allreduce"] and for_weights == ["mm", "mm"]


def embedding_on_ranks(rank: int, ranks: int, sequence_parallel: bool) -> Result:
    tp = tensor_parallel(ranks, sequence_parallel)
    embedding = VocabParallelEmbedding(ROWS, WIDTH, tp)
    fill(embedding)
    y = tp.exit(embedding(tokens()))
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
