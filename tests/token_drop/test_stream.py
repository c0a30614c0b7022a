"""The residual stream in place, against the loop that makes a new tensor for every layer."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ltd.token_drop.stream import add, own, release, take

LENGTH, SAMPLES, WIDTH, KEEP = 10, 3, 4, 4


def row_sets(layers: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layers)
    return [torch.randperm(LENGTH * SAMPLES, generator=generator)[:KEEP * SAMPLES].sort().values for _ in range(layers)]


def weights_of(layers: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + layers)
    return [torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
            for _ in range(layers)]


def stream_of(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LENGTH, SAMPLES, WIDTH, dtype=dtype, generator=generator).requires_grad_()


def in_place(stream: torch.Tensor, rows: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    stream = own(stream)
    for row, weight in zip(rows, weights, strict=True):
        stream, taken = take(stream, row)
        stream = add(stream, row, torch.tanh(taken @ weight))
    return release(stream)


def out_of_place(stream: torch.Tensor, rows: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    flat = stream.reshape(-1, WIDTH)
    for row, weight in zip(rows, weights, strict=True):
        selection = torch.nn.functional.one_hot(row, LENGTH * SAMPLES).to(flat.dtype)  # [k b, s b]
        flat = flat + selection.t() @ torch.tanh((selection @ flat) @ weight)
    return flat.view_as(stream)


@pytest.mark.parametrize("layers", [0, 1, 2, 5])
def test_derivatives_are_those_of_finite_differences(layers: int) -> None:
    rows = row_sets(layers)
    assert torch.autograd.gradcheck(lambda stream, *weights: in_place(stream, rows, list(weights)),
                                    (stream_of(), *weights_of(layers)))


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_values_and_gradients_are_those_of_the_plain_loop(layers: int) -> None:
    rows, weights = row_sets(layers), weights_of(layers)
    results = []
    for function in (in_place, out_of_place):
        stream = stream_of()
        out = function(stream * 1.0, rows, weights)
        loss = (out.square() * torch.arange(out.numel(), dtype=out.dtype).view_as(out)).sum()
        results.append((out, *torch.autograd.grad(loss, [stream, *weights])))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_full_layers_between_dropped_ones_have_the_plain_gradients() -> None:
    rows, weights = row_sets(4), weights_of(4)
    results = []
    for function in (in_place, out_of_place):
        stream = stream_of()
        middle = function(torch.sin(stream), rows[:2], weights[:2])
        middle = middle + torch.cos(middle)  # saves the stream for its backward pass
        out = function(middle, rows[2:], weights[2:]) * middle
        results.append((out, *torch.autograd.grad(out.sum(), [stream, *weights])))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_dropped_rows_keep_their_bits() -> None:
    rows, weights = row_sets(1), weights_of(1)
    stream = stream_of(torch.float32)
    out = in_place(stream, rows, [weights[0].float()])
    dropped = sorted(set(range(LENGTH * SAMPLES)) - set(rows[0].tolist()))
    assert len(dropped) == (LENGTH - KEEP) * SAMPLES
    before, after = stream.view(-1, WIDTH), out.view(-1, WIDTH)
    assert torch.equal(before[dropped], after[dropped])
    assert not (before[rows[0]] == after[rows[0]]).any()


def test_neither_the_input_nor_the_incoming_gradient_is_overwritten() -> None:
    rows, weights = row_sets(3), weights_of(3)
    stream = stream_of()
    before = stream.detach().clone()
    out = in_place(stream, rows, weights)
    incoming = torch.ones_like(out)
    first = torch.autograd.grad(out, [stream, *weights], incoming, retain_graph=True)
    assert torch.equal(incoming, torch.ones_like(out))
    assert torch.equal(stream, before)
    again = torch.autograd.grad(out, [stream, *weights], incoming)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_a_backward_pass_may_be_split_into_inputs_and_weights() -> None:
    """As zero-bubble pipeline schedules do."""
    rows, weights = row_sets(3), weights_of(3)
    stream = stream_of()
    expected = torch.autograd.grad(out_of_place(stream, rows, weights).square().sum(), [stream, *weights])
    loss = in_place(stream, rows, weights).square().sum()
    of_input = torch.autograd.grad(loss, [stream], retain_graph=True)
    of_weights = torch.autograd.grad(loss, weights)
    for ours, plain in zip((*of_input, *of_weights), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_stream_without_gradient_still_gives_the_weights_theirs() -> None:
    rows, weights = row_sets(2), weights_of(2)
    stream = stream_of().detach()
    ours = torch.autograd.grad(in_place(stream, rows, weights).square().sum(), weights)
    plain = torch.autograd.grad(out_of_place(stream, rows, weights).square().sum(), weights)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_dropped_layer_saves_nothing_of_full_length() -> None:
    rows, weights = row_sets(4), weights_of(4)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        in_place(stream_of(), rows, weights)
    assert len(saved) >= 4 * 3  # at the least two sets of rows and one activation per layer
    assert all(LENGTH not in shape and LENGTH * SAMPLES not in shape for shape in saved), saved


class FullLengthAllocations(TorchDispatchMode):
    """The operations whose results are new tensors as long as the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (isinstance(tensor, torch.Tensor) and tensor.numel() >= LENGTH * SAMPLES * WIDTH
                    and tensor.untyped_storage().data_ptr() not in known):
                self.operations.append(str(function))
        return result


@pytest.mark.parametrize("layers", [1, 6])
def test_a_run_of_dropped_layers_copies_the_stream_once_each_way(layers: int) -> None:
    rows, weights, stream = row_sets(layers), weights_of(layers), stream_of()
    with FullLengthAllocations() as forward:
        out = in_place(stream, rows, weights)
    incoming = torch.ones_like(out)
    with FullLengthAllocations() as backward:
        torch.autograd.grad(out, [stream, *weights], incoming)
    assert forward.operations == ["aten.clone.default"]
    assert backward.operations == ["aten.clone.default"]


def test_half_precision_adds_each_row_once() -> None:
    """Rows are distinct, so that an in-place add in bfloat16 rounds as the out-of-place one does."""
    rows = row_sets(1)[0]
    stream = stream_of().detach().to(torch.bfloat16)
    update = torch.randn(len(rows), WIDTH).to(torch.bfloat16)
    expected = stream.clone().view(-1, WIDTH)
    expected[rows] = expected[rows] + update
    assert torch.equal(add(own(stream), rows, update).view(-1, WIDTH), expected)
