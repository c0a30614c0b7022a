"""What follows from settings: batch sizes, run length, dropped layers, chunks; against counting by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig, TokenDropConfig
from megatron_ltd.config.training import ParallelConfig, TrainingConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import (
    data_parallel_size,
    global_batch_size,
    layer_tokens,
    parse_pipeline_split,
    pipeline_stages,
    policies,
    total_samples,
    total_steps,
    virtual_chunks,
)
from megatron_ltd.token_drop.kept_tokens import KeptTokens
from megatron_ltd.token_drop.lists import parse_layer_list, parse_length_list


def chooser(config: RunConfig) -> KeptTokens:
    (found,) = policies(config).active
    assert isinstance(found, KeptTokens)
    return found


def test_processes_beyond_tensor_and_pipeline_share_the_batch() -> None:
    config = RunConfig(parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4))
    assert [data_parallel_size(config, world) for world in (8, 16, 64)] == [1, 2, 8]


def test_the_global_batch_is_one_microbatch_a_process_unless_it_is_given() -> None:
    config = RunConfig(training=TrainingConfig(micro_batch_size=3))
    assert global_batch_size(config, 4) == 12
    assert global_batch_size(replace(config, training=TrainingConfig(global_batch_size=96)), 4) == 96


@pytest.mark.parametrize(("training", "steps", "samples"), [
    (TrainingConfig(train_iters=10, global_batch_size=8), 10, 80),
    (TrainingConfig(train_epochs=2, epoch_samples=39, global_batch_size=8), 10, 80),
    (TrainingConfig(train_epochs=2, epoch_samples=40, global_batch_size=8), 10, 80),
    (TrainingConfig(train_epochs=2, epoch_samples=3, global_batch_size=8), 1, 8),
    (TrainingConfig(train_samples=83, global_batch_size=8), 10, 80),
    (TrainingConfig(train_tokens=80 * 32 + 31, global_batch_size=8), 10, 80),
    (TrainingConfig(train_samples=7, global_batch_size=8), 0, 0),
    # 4 until 40 samples are consumed, 8 until 80, then 12: ten steps, five steps, five steps
    (TrainingConfig(train_samples=145, global_batch_size=12, rampup_batch_size=(4, 4, 80)), 20, 140),
    (TrainingConfig(train_iters=20, global_batch_size=12, rampup_batch_size=(4, 4, 80)), 20, 140),
])
def test_a_run_has_as_many_whole_steps_as_its_budget_allows(training: TrainingConfig, steps: int, samples: int) -> None:
    config = RunConfig(model=ModelConfig(seq_length=32), training=training)
    assert total_steps(config, 1) == steps
    assert total_samples(config, 1) == samples


@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 10), st.integers(0, 300), st.integers(1, 3000))
def test_the_length_of_a_ramped_run_is_that_of_running_it(
        start: int, increment: int, increments: int, ramp: int, budget: int) -> None:
    full = start + increment * increments
    config = RunConfig(training=TrainingConfig(train_samples=budget, global_batch_size=full,
                                               rampup_batch_size=(start, increment, ramp)))
    consumed = steps = 0
    while True:
        size = full if consumed >= ramp else start + increment * (consumed * increments // ramp)
        if consumed + size > budget:
            break
        consumed, steps = consumed + size, steps + 1
    assert (total_steps(config, 1), total_samples(config, 1)) == (steps, consumed)


@pytest.mark.parametrize(("text", "layers"), [
    ("0", (0,)), ("1-4", (1, 2, 3, 4)), ("1,3,5-9", (1, 3, 5, 6, 7, 8, 9)), (" 2 , 4 - 5 ", (2, 4, 5)), ("7-7", (7,)),
    ("5,1", (5, 1)),
])
def test_a_list_of_layers_is_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layer_list(text) == layers


@pytest.mark.parametrize("text", ["", " ", ",", "1,", "a", "1-", "-1", "3-1", "1--2", "1.5", "0-99999", "1 2", "²"])
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--random-ltd-layers = .*write for example"):
        parse_layer_list(text)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_a_list_of_layers_survives_writing_and_reading(layers: list[int]) -> None:
    assert parse_layer_list(",".join(map(str, layers))) == tuple(layers)


def test_all_layers_but_the_first_and_the_last_drop_tokens_by_default() -> None:
    config = RunConfig(model=ModelConfig(num_layers=6), token_drop=TokenDropConfig(random_ltd=True))
    assert chooser(config).dropped == (1, 2, 3, 4)
    listed = replace(config, token_drop=TokenDropConfig(token_drop_policy="random", random_ltd_layers="5,0-1"))
    assert chooser(listed).dropped == (0, 1, 5)
    assert policies(replace(config, token_drop=TokenDropConfig(random_ltd_layers="1-3"))).active == ()


@pytest.mark.parametrize(("text", "split"), [
    ("uniform", None), ("auto", None), ("5,7,7,5", (5, 7, 7, 5)), (" 3 , 4", (3, 4)), ("8", (8,))])
def test_a_pipeline_split_is_uniform_or_numbers(text: str, split: tuple[int, ...] | None) -> None:
    assert parse_pipeline_split(text) == split


@pytest.mark.parametrize("text", ["", "even", "1,,2", "1,-2", "1.5,2", "1;2", "9999999"])
def test_what_is_no_pipeline_split_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--pipeline-split = .*write for example"):
        parse_pipeline_split(text)


@pytest.mark.parametrize(("parallel", "chunks"), [
    (ParallelConfig(), 1),
    (ParallelConfig(pipeline_model_parallel_size=4), 1),
    (ParallelConfig(pipeline_model_parallel_size=4, pipeline_schedule="zbv"), 2),
    (ParallelConfig(pipeline_schedule="zbv"), 1),
    (ParallelConfig(pipeline_model_parallel_size=4, pipeline_schedule="interleaved",
                    num_layers_per_virtual_pipeline_stage=2), 3),
    (ParallelConfig(pipeline_model_parallel_size=4, pipeline_schedule="interleaved-zero-bubble",
                    num_layers_per_virtual_pipeline_stage=6), 1),
    (ParallelConfig(pipeline_model_parallel_size=2, pipeline_schedule="interleaved", pipeline_split="5,7,7,5"), 2),
    (ParallelConfig(pipeline_schedule="interleaved", num_layers_per_virtual_pipeline_stage=2), 1),
])
def test_chunks_follow_from_the_schedule(parallel: ParallelConfig, chunks: int) -> None:
    config = RunConfig(model=ModelConfig(num_layers=24), parallel=parallel)
    assert virtual_chunks(config) == chunks
    assert pipeline_stages(config) == chunks * parallel.pipeline_model_parallel_size


def dropping(**settings: object) -> RunConfig:
    return RunConfig(model=ModelConfig(num_layers=6, seq_length=512),
                     token_drop=TokenDropConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(("settings", "lengths"), [
    ({}, (512, 512, 512)),
    ({"random_ltd": True}, (128, 128, 128)),
    ({"token_drop_policy": "importance"}, (256, 256, 256)),
    ({"random_ltd": True, "random_ltd_start_length": 64, "random_ltd_steps": 100}, (64, 288, 512)),
    ({"random_ltd": True, "random_ltd_start_length": 64, "random_ltd_steps": 100, "random_ltd_root_degree": 2},
     (64, 368, 512)),  # 64 + 448 / sqrt(2) = 380.8, in multiples of 16
    ({"random_ltd": True, "random_ltd_length_list": "0:32, 50:96,80:512"}, (32, 96, 512)),
])
def test_the_kept_length_follows_from_the_settings(settings: dict[str, object], lengths: tuple[int, ...]) -> None:
    config = dropping(**settings)
    found = policies(config)
    assert tuple(found.plan(step).kept_tokens for step in (0, 50, 100)) == lengths


@pytest.mark.parametrize("text", ["", "128", "0:128,", "5:128", "0:128,0:256", "0:128,50:256,20:300", "0:256,10:128",
                                  "0:0", "0:-1", "0:128;5:256", "0:1.5"])
def test_what_is_no_list_of_lengths_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--random-ltd-length-list = .*write for example"):
        parse_length_list(text)


def test_a_budget_in_layer_tokens_takes_more_steps_than_one_in_raw_tokens() -> None:
    """4 samples a step of 512 tokens in 2 of 6 layers and 128 in the others: (1,024 + 512) / 6 x 4 = 1,024 layer
    tokens a step of 2,048 raw ones."""
    config = replace(dropping(random_ltd=True), training=TrainingConfig(
        micro_batch_size=4, train_tokens=20_479, token_budget="layer"))
    assert total_steps(config, 1) == 19 and total_samples(config, 1) == 76
    assert total_steps(replace(config, training=replace(config.training, train_tokens=20_480)), 1) == 20
    raw = replace(config, training=replace(config.training, token_budget="raw"))
    assert total_steps(raw, 1) == 9


def test_lengths_and_layer_tokens_of_the_published_vit_whose_197_tokens_are_no_multiple_of_8() -> None:
    config = RunConfig(
        model=ModelConfig(family="vit", num_layers=12, seq_length=197),
        token_drop=TokenDropConfig(random_ltd=True, random_ltd_start_length=32, random_ltd_length_step=8,
                                   random_ltd_steps=3910),
        training=TrainingConfig(train_iters=5474, global_batch_size=128))
    lengths = [chooser(config).lengths.at(step) for step in range(5474)]
    by_hand = [(32 + 165 * step // 3910) // 8 * 8 if step < 3910 else 197 for step in range(5474)]
    assert lengths == by_hand and set(lengths) == {*range(32, 193, 8), 197}
    assert layer_tokens(config, 1).sum_after(5474) == sum(128 * (2 * 197 + 10 * length) for length in lengths)
