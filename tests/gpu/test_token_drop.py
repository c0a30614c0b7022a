"""Kept positions and the in-place residual stream on a GPU."""

import pytest
import torch

from megatron_ltd.token_drop.sampling import kept_positions
from megatron_ltd.token_drop.stream import add, own, release, take
from tests.gpu.conftest import DEVICE

LENGTH, SAMPLES, WIDTH, KEEP = 10, 3, 4, 4


@pytest.mark.parametrize(("length", "kept", "strata"), [(128, 1, 1), (1024, 512, 1), (1000, 250, 2), (4096, 1024, 8)])
def test_kept_sets_are_those_of_the_cpu(length: int, kept: int, strata: int) -> None:
    samples, layers = torch.tensor([0, 1, 77, 2**40]), torch.tensor([0, 3, 95])
    expected = kept_positions(1234, samples, layers, sequence_tokens=length, kept_tokens=kept, strata=strata)
    found = kept_positions(1234, samples.to(DEVICE), layers.to(DEVICE), sequence_tokens=length, kept_tokens=kept,
                           strata=strata)
    assert torch.equal(found.cpu(), expected)


def test_derivatives_of_the_stream_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(LENGTH * SAMPLES, generator=generator)[:KEEP * SAMPLES].sort().values.to(DEVICE)
            for _ in range(3)]
    stream = torch.randn(LENGTH, SAMPLES, WIDTH, dtype=torch.float64, generator=generator).to(DEVICE).requires_grad_()
    weights = [torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator).to(DEVICE).requires_grad_()
               for _ in rows]

    def dropped_layers(stream: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        stream = own(stream)
        for row, weight in zip(rows, weights, strict=True):
            stream, taken = take(stream, row)
            stream = add(stream, row, torch.tanh(taken @ weight))
        return release(stream)

    # Sums of distinct rows have one term each: the same bits every time.
    assert torch.autograd.gradcheck(dropped_layers, (stream, *weights), nondet_tol=0.0)
