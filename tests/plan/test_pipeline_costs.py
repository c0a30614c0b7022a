"""Stages of a run, their work and the predicted speed, by hand and for the published shapes."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import ParallelConfig, TrainingConfig
from megatron_ltd.model.arithmetic.flops import plan_flops
from megatron_ltd.plan.derived import policies, whole_backward
from megatron_ltd.plan.layouts.pipeline_costs import (
    best_split,
    describe,
    head_cost,
    layer_costs,
    pipeline_layers,
    pipeline_time,
    plan_samples,
    predict,
)
from tests.plans import plan_of


def bert_large(pp: int, split: str, **parallel: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(family="bert", num_layers=24, hidden_size=1024, num_attention_heads=16, seq_length=512,
                          vocab_size=30_522),
        token_drop=TokenDropConfig(token_drop_policy="importance"),
        parallel=ParallelConfig(pipeline_model_parallel_size=pp, pipeline_split=split, **parallel),
        training=TrainingConfig(micro_batch_size=4, global_batch_size=4096, train_iters=1000))


def growing(**parallel: Any) -> RunConfig:
    """6 layers of which 4 keep 16 of 64 tokens for 30 steps and all for 10; 8 samples a step."""
    return RunConfig(
        model=ModelConfig(num_layers=6, hidden_size=32, num_attention_heads=4, seq_length=64, vocab_size=100),
        token_drop=TokenDropConfig(random_ltd=True, random_ltd_length_list="0:16,30:64"),
        parallel=ParallelConfig(pipeline_model_parallel_size=2, **parallel),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=8, train_iters=40))


def test_a_split_is_what_was_asked_for() -> None:
    assert pipeline_layers(bert_large(4, "uniform"), 1) == (6, 6, 6, 6)
    assert pipeline_layers(bert_large(4, "4,5,6,9"), 1) == (4, 5, 6, 9)
    assert pipeline_layers(bert_large(4, "auto"), 1) == best_split(bert_large(4, "uniform"), 1)
    assert sum(pipeline_layers(bert_large(4, "auto", pipeline_schedule="zbv"), 1)) == 24
    assert len(pipeline_layers(bert_large(4, "auto", pipeline_schedule="zbv"), 1)) == 8
    assert pipeline_layers(bert_large(1, "auto"), 1) == (24,)


def test_the_work_of_the_layers_and_the_head_is_that_of_the_sample() -> None:
    for config, kept in ((bert_large(4, "auto"), 256), (growing(), 16), (growing(), 64)):
        predictions = 77 if config.model.family == "bert" else None
        plan = policies(config).keeping(kept)
        assert sum(layer_costs(config, plan)) + head_cost(config, plan) == plan_flops(config.model, plan, predictions)


def test_recomputed_layers_cost_a_forward_pass_more_and_the_head_does_not() -> None:
    plain, again = growing(), growing(recompute_granularity="full")
    work = policies(plain).keeping(16)
    assert [3 * cost for cost in layer_costs(again, work)] == [4 * cost for cost in layer_costs(plain, work)]
    assert head_cost(again, work) == head_cost(plain, work)


def test_flops_are_averaged_over_the_run_rather_than_the_length() -> None:
    config = growing(pipeline_split="3,3")
    dropped, whole = policies(config).keeping(16), policies(config).whole
    assert plan_samples(config, 1) == {dropped: 240, whole: 80}
    short, full = layer_costs(config, dropped), layer_costs(config, whole)
    first = 0.75 * sum(short[:3]) + 0.25 * sum(full[:3])
    last = 0.75 * sum(short[3:]) + 0.25 * sum(full[3:]) + head_cost(config, whole)
    found = predict(config, 1, (3, 3))
    assert found.shares == pytest.approx((2 * first / (first + last), 2 * last / (first + last)))
    # 1f1b with four microbatches: (4 + 1) passes of the busiest, less what the other one is shorter by
    assert found.seconds == pytest.approx(last + first / 4)
    assert found.bubble == pytest.approx(1.0 - (first + last) / 2 / (last + first / 4))


def test_a_run_without_dropping_has_equal_layers_and_needs_no_length() -> None:
    config = replace(growing(pipeline_split="auto"), token_drop=TokenDropConfig(), training=TrainingConfig())
    assert len(set(layer_costs(config, plan_of(64, 6)))) == 1
    assert pipeline_layers(config, 1) == (3, 3)


@pytest.mark.parametrize(("schedule", "settings", "bubble"), [
    ("1f1b", {}, 3 / 19), ("interleaved", {"num_layers_per_virtual_pipeline_stage": 3}, 1.5 / 17.5),
    ("interleaved-zero-bubble", {"num_layers_per_virtual_pipeline_stage": 3}, 0.5 / 16.5),
    ("interleaved-zero-bubble", {"num_layers_per_virtual_pipeline_stage": 3, "recompute_granularity": "full"},
     1.5 / 17.5), ("zbv", {}, 0.0)])
def test_the_bubble_of_equal_stages_is_the_textbooks(schedule: Any, settings: dict[str, Any], bubble: float) -> None:
    """(p - 1) / (m + p - 1) for 4 processes and 16 microbatches, a share of it where chunks or split backward passes
    fill the gaps. With a vocabulary of one token the head is next to nothing."""
    config = bert_large(4, "uniform", pipeline_schedule=schedule, **settings)
    config = replace(config, token_drop=TokenDropConfig(), training=replace(config.training, global_batch_size=64),
                     model=replace(config.model, family="gpt", vocab_size=1))
    assert predict(config, 1, pipeline_layers(config, 1)).bubble == pytest.approx(bubble, abs=1e-4)


def test_shared_gradients_are_reduced_by_whole_backward_passes() -> None:
    config = bert_large(4, "uniform", pipeline_schedule="zbv", use_distributed_optimizer=True)
    assert [whole_backward(config, dp) for dp in (1, 2)] == [False, True]
    assert not whole_backward(bert_large(4, "uniform", pipeline_schedule="zbv"), 2)


def test_token_dropping_on_bert_large_gains_a_fifth_from_balance() -> None:
    line, warning = describe(bert_large(4, "auto"), 1)
    assert warning is None
    speed = float(line.split("throughput ")[1].split(" x")[0])
    assert speed >= 1.19
    config = bert_large(4, "uniform")
    slow, fast = predict(config, 1, (6, 6, 6, 6)), predict(config, 1, best_split(config, 1))
    assert slow.seconds / fast.seconds == pytest.approx(speed, abs=0.005)
    line, warning = describe(config, 1)
    assert "layers 6,6,6,6" in line and "throughput 1.00 x" in line
    assert warning is not None and warning.startswith("--pipeline-split = uniform: the busiest of 4 processes has 1.3")
    assert f"--pipeline-split auto ({','.join(map(str, best_split(config, 1)))})" in warning


@pytest.mark.parametrize("parallel", [
    {"pipeline_schedule": "zbv"}, {"pipeline_schedule": "interleaved", "num_layers_per_virtual_pipeline_stage": 3},
    {"pipeline_schedule": "interleaved-zero-bubble", "num_layers_per_virtual_pipeline_stage": 2}])
def test_schedules_of_several_chunks_are_balanced_too(parallel: dict[str, Any]) -> None:
    config = bert_large(4, "auto", **parallel)
    split = pipeline_layers(config, 1)
    chunks = {"zbv": 2, "interleaved": 2, "interleaved-zero-bubble": 3}[parallel["pipeline_schedule"]]
    assert len(split) == 4 * chunks and sum(split) == 24 and min(split) >= 1
    found = predict(config, 1, split)
    assert max(found.shares) < 1.08
    assert max(found.shares) <= max(predict(config, 1, pipeline_layers(replace(config, parallel=replace(
        config.parallel, pipeline_split="uniform")), 1)).shares)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_a_single_microbatch_passes_through_one_process_at_a_time(schedule: str) -> None:
    assert pipeline_time([1.0, 2.0, 1.5], 1, schedule, 1 if schedule == "1f1b" else 2, False) == pytest.approx(4.5)


def test_fewer_microbatches_than_processes_leave_gaps_that_chunks_do_not_fill() -> None:
    # Four processes of two chunks. With as many microbatches, only the end of a round waits: 4 + 3 / 2. With two, the
    # second follows the first half a unit later through all eight chunks.
    works = [1.0] * 4
    assert pipeline_time(works, 4, "interleaved", 2, False) == pytest.approx(5.5)
    assert pipeline_time(works, 2, "interleaved", 2, False) == pytest.approx(4.5)
    assert pipeline_time(works, 16, "interleaved", 2, False) == pytest.approx(17.5)
    # Split in two, a third of the work waits for later.
    assert pipeline_time(works, 1, "zbv", 2, True) == pytest.approx(8 / 3)
    assert pipeline_time(works, 16, "zbv", 2, True) == pytest.approx(16.0)
