"""Convolutions of queries, keys and values; the model against explicit loops is in test_token_drop.py, with routers in
test_mixture_of_depths.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ltd.model.arithmetic.flops import layer_flops
from megatron_ltd.model.arithmetic.shapes import layer_matrices, parameter_count
from megatron_ltd.model.attention.convolution import convolved, reading_of
from megatron_ltd.model.init import initial_value
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model import dense_reference
from tests.model.generated import assert_generated_as_evaluated
from tests.model.tiny import (
    BLOOM_LIKE,
    CONVOLUTION,
    GPT2_LIKE,
    LLAMA_LIKE,
    QWEN3_LIKE,
    assert_gradients_close,
    build_gpt,
    documents,
    load,
    loss_and_gradients,
    run,
    tiny_batch,
    tiny_config,
    whole_parameters,
)

TOKENS, SAMPLES, CHANNELS = 11, 3, 8
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(kernel: int) -> Operands:
    """x, a weight, and a gradient of the result."""
    generator = torch.Generator().manual_seed(kernel)
    shapes = (TOKENS, SAMPLES, CHANNELS), (CHANNELS, kernel - 1), (TOKENS, SAMPLES, CHANNELS)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), grad


@pytest.mark.parametrize("kernel", [2, 4, 16])
@pytest.mark.parametrize("explicit", [False, True])
def test_all_tokens_are_convolved_as_torch_convolves(kernel: int, explicit: bool) -> None:
    x, weight, grad = operands(kernel)
    reading = reading_of(torch.arange(TOKENS)[:, None], kernel - 1) if explicit else None
    ours = convolved(x, weight, reading)
    found = torch.autograd.grad(ours, (x, weight), grad)
    filters = torch.cat((weight.flip(1), torch.ones(CHANNELS, 1)), dim=1)[:, None]
    theirs = F.conv1d(F.pad(x.permute(1, 2, 0), (kernel - 1, 0)), filters, groups=CHANNELS).permute(2, 0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(theirs, (x, weight), grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rows_without_gaps_are_told_apart_by_their_documents_alone() -> None:
    x, weight, grad = operands(4)
    ids = torch.tensor([0] * 4 + [1] * 1 + [2] * 6)[:, None].expand(-1, SAMPLES)
    readings = [reading_of(torch.arange(TOKENS)[:, None], 3, ids, gaps=gaps) for gaps in (True, False)]
    assert [len(reading) for reading in readings] == [6, 3]
    first, second = (convolved(x, weight, reading) for reading in readings)
    assert torch.equal(first, second)
    for one, other in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (first, second)), strict=True):
        assert torch.equal(one, other)


def test_kept_tokens_read_those_of_all_that_are_kept_with_the_weights_of_their_distances() -> None:
    x, weight, _ = operands(4)
    places = torch.tensor([[0, 1, 4], [2, 2, 5], [3, 3, 6], [7, 4, 9]])
    rows = x.detach()[:4]
    whole = torch.zeros(10, SAMPLES, CHANNELS)
    for row, places_of_row in enumerate(places):
        for b in range(SAMPLES):
            whole[places_of_row[b], b] = rows[row, b]
    expected = convolved(whole, weight, None)
    found = convolved(rows, weight, reading_of(places, 3))
    for row, places_of_row in enumerate(places):
        for b in range(SAMPLES):
            torch.testing.assert_close(found[row, b], expected[places_of_row[b], b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reading", [None, reading_of(torch.arange(TOKENS)[:, None] * 5 // 4, 3)],
                         ids=["all tokens", "with gaps"])
def test_a_compiled_convolution_is_the_same(reading: Any) -> None:
    x, weight, grad = operands(4)
    compiled = torch.compile(convolved, backend="aot_eager", fullgraph=True)(x, weight, reading)
    plain = convolved(x, weight, reading)
    torch.testing.assert_close(compiled, plain)
    for one, other in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (compiled, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_in_half_precision_the_gradient_of_the_weights_is_added_up_in_fp32() -> None:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.rand((4096, 1, 1), generator=generator).bfloat16() for _ in range(2))
    weight = torch.zeros(1, 1, requires_grad=True)
    convolved(x, weight, None).backward(grad)
    assert weight.grad is not None
    exact = float((x[:-1].double() * grad[1:].double()).sum())
    assert float(weight.grad) == pytest.approx(exact, rel=1e-3)  # 4,096 ones added up in bf16 end at 256


def test_a_new_convolution_changes_nothing(tp: TensorParallel) -> None:
    config, plain_config = tiny_config(**LLAMA_LIKE, **CONVOLUTION), tiny_config(**LLAMA_LIKE)
    model, plain = build_gpt(config, tp), build_gpt(plain_config, tp)
    names = [f"layers.{layer}.attention.conv.weight" for layer in range(5)]
    channels = (4 + 2 * 2) * 8
    new = {name: initial_value(name, torch.Size((channels, 3)), config, 1) for name in names}
    load(model, whole_parameters(plain) | new)
    assert torch.equal(run(model, tiny_batch(config)), run(plain, tiny_batch(config)))
    assert parameter_count(config) - parameter_count(plain_config) == 5 * channels * 3


def test_a_token_depends_on_no_later_one(tp: TensorParallel) -> None:
    config = tiny_config(**QWEN3_LIKE, **CONVOLUTION)
    model, batch = build_gpt(config, tp).eval(), tiny_batch(config)
    other = batch["tokens"].clone()
    other[:, 12:] = (other[:, 12:] + 1) % 61
    first, second = (run(model, {**batch, "tokens": tokens}) for tokens in (batch["tokens"], other))
    assert torch.allclose(first[:, :, :12], second[:, :, :12], atol=1e-6)
    assert not torch.allclose(first[:, :, 12:], second[:, :, 12:], atol=1e-2)


def test_queries_of_kept_tokens_and_keys_of_all_read_their_own(tp: TensorParallel) -> None:
    """In a layer that attends to all tokens."""
    config = tiny_config(**LLAMA_LIKE, **CONVOLUTION)
    kept = [[0, 1, 2, 3, 5, 8, 9, 20, 22, 23]] * 3
    batch = tiny_batch(config) | documents(config) | {"kept": torch.tensor(kept)}
    model = build_gpt(config, tp, dropped=[1, 2, 3], kept=10, shared=True, cross_layer=1)
    weights = dense_reference.leaves(whole_parameters(model))
    expected = dense_reference.loss(weights, config, batch, dict.fromkeys((1, 2, 3), kept), cross=1)
    expected.backward()
    loss, gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0.0)
    assert_gradients_close(gradients, {name: w.grad for name, w in weights.items() if w.grad is not None})


@pytest.mark.parametrize("settings", [GPT2_LIKE | CONVOLUTION, LLAMA_LIKE | {"qkv_conv_kernel": 9},
                                      BLOOM_LIKE | {"qkv_conv_kernel": 2}], ids=["learned", "wide", "narrow"])
@pytest.mark.parametrize("start", [1, 5])
def test_generation_reads_tokens_one_by_one_as_evaluation_reads_them_at_once(
    tp: TensorParallel, settings: dict[str, Any], start: int,
) -> None:
    assert_generated_as_evaluated(tiny_config(**settings), tp, first=start, stop=14)


def test_its_weights_are_no_matrix_and_cost_what_they_multiply() -> None:
    plain, config = tiny_config(**LLAMA_LIKE), tiny_config(**LLAMA_LIKE, **CONVOLUTION)
    assert layer_matrices(config) == layer_matrices(plain)

    def more(kept: int, **kind: Any) -> int:
        costs = [layer_flops(one, kept, **kind) for one in (config, plain)]
        return costs[0] - costs[1]
    assert more(24) == 2 * 3 * 24 * 64 and more(10) == 2 * 3 * 10 * 64
    assert more(10, attends_to_all=True) == 2 * 3 * (10 * 32 + 24 * 32)
