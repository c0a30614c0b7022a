"""Compiled layers never run uncompiled without a word, however many lengths a run has."""

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from megatron_ltd.config.run import RunConfig
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.plan.derived import policies
from megatron_ltd.train.compilation import prepare_compilation
from megatron_ltd.train.setup import build_model
from megatron_ltd.train.step import train_step
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


BAGS = with_settings(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=32, vocab_size=40,
                     make_vocab_size_divisible_by=8, random_ltd=False, random_ltd_start_length=None,
                     random_ltd_steps=None, token_superposition=2, token_superposition_steps=2, micro_batch_size=2)
BESIDES = {"routed": {"mixture_of_depths_capacity": 0.25},
           "more-text-ltd": {"token_superposition_text": "more", "random_ltd": True, "random_ltd_start_length": 8,
                             "random_ltd_layers": "1"}}


def losses(config: RunConfig) -> list[float]:
    """Four steps, of which the first two read bags, on one process."""
    device, found = torch.device("cpu"), []
    mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
    model = build_model(config, mesh, device)
    optimizer = ShardedOptimizer([(p.name, p.parameter) for p in model.parameters], config)
    for step in range(4):
        plan = policies(config).plan(step)
        text = torch.randint(0, 40, (2, plan.text_tokens + 1), generator=torch.Generator().manual_seed(step))
        batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(2, plan.text_tokens),
                 "sample_ids": torch.arange(2) + 2 * step}
        found.append(train_step(model, optimizer, [batch], config, plan, learning_rate=1e-2, loss_scale=1.0,
                                stop_level=0, device=device).loss)
    return found


@pytest.mark.parametrize("name", BESIDES)
def test_compiled_layers_read_bags_and_then_tokens_as_plain_ones_do(name: str) -> None:
    """Captured as a whole, without the code generation, which takes long and knows nothing of bags."""
    config = with_settings(BAGS, **BESIDES[name])
    captured = partial(torch.compile, backend="aot_eager", fullgraph=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = losses(config)
        with mock.patch.object(torch, "compile", captured):
            assert losses(with_settings(config, compile=True)) == pytest.approx(plain, rel=1e-6)
        assert counters["stats"]["unique_graphs"] >= 2
    finally:
        dist.destroy_process_group()


def test_a_growing_length_takes_a_graph_of_the_whole_and_one_of_any_other_beside_the_two_of_the_head() -> None:
    config = with_settings(BAGS, num_layers=3, token_superposition=None, token_superposition_steps=None, compile=True,
                           random_ltd=True, random_ltd_start_length=4, random_ltd_length_step=4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(seconds=60))
        with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
            model = build_model(config, mesh, torch.device("cpu"))
        for kept in range(4, 33, 4):
            text = torch.randint(40, (2, 33))
            facts = {"labels": text[:, 1:], "loss_mask": torch.ones(2, 32), "sample_ids": torch.arange(2),
                     "plan": policies(config).keeping(kept)}
            model.pipeline.train_step(text[:, :-1], facts, microbatches=1, loss_weights=torch.ones(1))
            assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    finally:
        dist.destroy_process_group()
