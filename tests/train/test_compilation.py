"""Compiled layers never run uncompiled without a word, however many lengths a run has."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_ltd.plan.derived import policies
from megatron_ltd.train.compilation import prepare_compilation
from tests.runnable_settings import with_settings

MANY = with_settings(compile=True, random_ltd_start_length=16, random_ltd_length_step=16)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()


def run_lengths(count: int) -> int:
    """Graphs that a function compiled for each length comes to."""
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x

    compiled = torch.compile(doubled, backend="eager", dynamic=False)
    for length in range(2, 2 + count):
        assert torch.equal(compiled(torch.ones(length)), torch.full((length,), 2.0))
    return counters["stats"]["unique_graphs"]


def test_lengths_are_counted() -> None:
    assert policies(MANY).lengths() == set(range(16, 257, 16))
    assert policies(with_settings(random_ltd=False)).lengths() == {256}
    listed = with_settings(random_ltd_length_list="0:64,5:64,9:128", random_ltd_start_length=None,
                           random_ltd_steps=None)
    assert policies(listed).lengths() == {64, 128, 256}  # the first and the last layer keep all


def test_as_many_graphs_fit_as_the_run_has_lengths() -> None:
    assert run_lengths(12) < 12, "torch's own limit must be too small for this test to mean anything"
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        prepare_compilation(MANY)
        assert run_lengths(16) == 16


def test_beyond_the_limit_torch_says_so() -> None:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        prepare_compilation(with_settings(compile=True, random_ltd=False))
        assert torch._dynamo.config.recompile_limit == 8
        with pytest.raises(Exception, match="recompile_limit"):
            run_lengths(12)


def test_without_compile_torchs_limits_are_left_alone() -> None:
    prepare_compilation(with_settings())
    assert torch._dynamo.config.recompile_limit == 8 and not torch._dynamo.config.fail_on_recompile_limit_hit
