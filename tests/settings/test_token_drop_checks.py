"""The policies: what is refused, what is accepted, and lengths in closed form by hand."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ltd.plan.derived import layer_tokens, policies, total_steps
from megatron_ltd.plan.layer_tokens import LayerTokens
from megatron_ltd.plan.layouts.pipeline_costs import head_cost, layer_costs, plan_samples
from megatron_ltd.plan.learning_rate import LearningRate, learning_rate_spans
from megatron_ltd.settings.checks.all import violations
from megatron_ltd.settings.checks.idle import idle_settings
from megatron_ltd.token_drop.plan import StepPlan
from megatron_ltd.token_drop.policy import Policy, Shape
from megatron_ltd.token_drop.registry import Policies
from tests.plans import plan_of
from tests.runnable_settings import with_settings

CURRICULUM: dict[str, Any] = {"seq_length_curriculum_start_length": 64, "seq_length_curriculum_steps": 30}
ROUTED: dict[str, Any] = {"mixture_of_depths_capacity": 0.25, "random_ltd": False}
TOKENS: dict[str, Any] = {"train_iters": None, "lr_warmup_iters": 0}

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"layer_drop_rate": 1.0}, ["--layer-drop-rate = 1.0: must be at least 0 and below 1"]),
    ({"layer_drop_rate": -0.1}, ["--layer-drop-rate = -0.1"]),
    ({"layer_drop_rate": 0.1, "layer_drop_layers": "1-24"},
     ["--layer-drop-layers = 1-24: layer 24 does not exist", "name layers up to 23"]),
    ({"layer_drop_rate": 0.1, "layer_drop_layers": "1,1-2"}, ["--layer-drop-layers = 1,1-2: layer 1 is listed twice"]),
    ({"layer_drop_rate": 0.1, "layer_drop_layers": "all"}, ["--layer-drop-layers = 'all': 'all' is neither a layer"]),
    ({"layer_drop_rate": 0.1, **TOKENS, "train_tokens": 10**6, "token_budget": "layer"},
     ["--token-budget = layer is given with --layer-drop-rate = 0.1", "steps, samples or raw tokens"]),
    ({"layer_drop_rate": 0.1, "layer_token_lr": True, "lr_warmup_iters": 0},
     ["--layer-token-lr is given with --layer-drop-rate = 0.1"]),
    ({"alternate_tokens": 2}, ["--random-ltd is given with --alternate-tokens = 2", "keep one"]),
    ({"alternate_tokens": 3, "random_ltd": False}, ["--alternate-tokens = 3", "choose a divisor of 256"]),
    ({"alternate_tokens": 2, "random_ltd": False, **CURRICULUM}, ["--alternate-tokens = 2 is given with"]),
    ({"layer_dropout_rate": 0.5}, ["--layer-dropout-rate = 0.5 is given without --layer-dropout-steps"]),
    ({"layer_dropout_rate": 0.5, "layer_dropout_steps": 9, "layer_drop_rate": 0.1},
     ["--layer-drop-rate = 0.1 is given with --layer-dropout-rate = 0.5: layers are skipped by one policy"]),
    ({"pld_theta": 1.5}, ["--pld-theta = 1.5: must be at least 0 and at most 1"]),
    ({"pld_theta": 0.5, "pld_gamma": 0.0}, ["--pld-gamma = 0.0: must be above 0"]),
    ({"raptr_stages": "0:12,9:25"}, ["--raptr-stages = 0:12,9:25", "from 2 to --num-layers = 24 layers, not 25"]),
    ({"raptr_stages": "0:12,9:6"}, ["--raptr-stages = '0:12,9:6'", "never falling"]),
    ({"raptr_stages": "0:12", "pld_theta": 0.5},
     ["--pld-theta = 0.5 is given with --raptr-stages = 0:12: layers are skipped by one policy"]),
    ({"layer_dropout_rate": 0.5, "layer_dropout_steps": 9, "layer_token_lr": True, "lr_warmup_iters": 0},
     ["--layer-token-lr is given with --layer-dropout-rate = 0.5"]),
    ({"drop_backward_rate": 1.0}, ["--drop-backward-rate = 1.0: must be at least 0 and below 1"]),
    ({"token_superposition": 2}, ["--token-superposition = 2 is given without --token-superposition-steps"]),
    ({"token_superposition": 1, "token_superposition_steps": 2}, ["--token-superposition = 1: must be at least 2"]),
    ({"token_superposition": 3, "token_superposition_steps": 2},
     ["--token-superposition = 3: --seq-length = 256 is not a whole number of bags", "choose a multiple of 3, or"]),
    ({"token_superposition": 4, "token_superposition_steps": 2, "random_ltd_strata": 128},
     ["--seq-length = 256 is not a whole number of bags that divide evenly", "choose a multiple of 512"]),
    ({"token_superposition": 2, "token_superposition_steps": 2, **CURRICULUM, "seq_length_curriculum_length_step": 1},
     ["--token-superposition = 2: --seq-length-curriculum-length-step = 1"]),
    ({"token_superposition": 2, "token_superposition_steps": 2, "reset_attention_mask": True},
     ["--reset-attention-mask is given with --token-superposition = 2"]),
    ({"token_superposition": 2, "token_superposition_steps": 2, "family": "bert"}, ["BERT predicts masked tokens"]),
    ({"token_superposition": 2, "token_superposition_steps": 2, "random_ltd": False, "token_drop_policy": "importance"},
     ["--token-superposition = 2 is given with --token-drop-policy = importance"]),
    ({"mixture_of_depths_capacity": 0.0}, ["--mixture-of-depths-capacity = 0.0: must be above 0 and at most 1"]),
    ({**ROUTED, "family": "bert"}, ["--mixture-of-depths-capacity = 0.25 is given for a model that is not a GPT"]),
    ({**ROUTED, "mixture_of_depths_every": 25}, ["--mixture-of-depths-every = 25", "choose at most 24"]),
    ({**ROUTED, "sequence_parallel": True, "tensor_model_parallel_size": 2},
     ["--mixture-of-depths-strata = 1: with --sequence-parallel", "use --mixture-of-depths-strata 2"]),
    ({**ROUTED, "mixture_of_depths_strata": 3}, ["--mixture-of-depths-strata = 3: does not divide the 256 tokens"]),
    ({**ROUTED, **CURRICULUM, "seq_length_curriculum_length_step": 6, "mixture_of_depths_strata": 4},
     ["--mixture-of-depths-strata = 4: does not divide the 66 tokens"]),
    ({"token_drop_policy": "tread"}, ["--random-ltd is given with --token-drop-policy = tread"]),
    ({"random_ltd": False, "token_drop_policy": "tread", "tread_set_layers": 0}, ["--tread-set-layers = 0"]),
    ({"seq_length_curriculum_start_length": 64}, ["given without --seq-length-curriculum-steps"]),
    ({**CURRICULUM, "seq_length_curriculum_start_length": 257}, ["= 257: more than --seq-length = 256"]),
    ({**CURRICULUM, "seq_length_curriculum_length_step": 0}, ["--seq-length-curriculum-length-step = 0"]),
    ({**CURRICULUM, "seq_length_curriculum_start_length": 66, "random_ltd_strata": 4},
     ["--seq-length-curriculum-start-length = 66: not a multiple of --random-ltd-strata = 4; choose 68"]),
    ({**CURRICULUM, "seq_length_curriculum_length_step": 6, "random_ltd_strata": 4},
     ["--seq-length-curriculum-length-step = 6: not a multiple of --random-ltd-strata = 4; choose 8"]),
    ({**CURRICULUM, "seq_length_curriculum_start_length": 65, "random_ltd": False, "sequence_parallel": True,
      "tensor_model_parallel_size": 2}, ["= 65: not a multiple of --tensor-model-parallel-size = 2"]),
    ({**CURRICULUM, "family": "bert"}, ["--seq-length-curriculum-start-length = 64", "BERT ends with [SEP]"]),
    ({**CURRICULUM, "family": "vit"}, ["--seq-length-curriculum-start-length = 64", "an image has no first ones"]),
    ({**CURRICULUM, "train_jsonl": ("x",), "data_path": None}, ["with --train-jsonl", "would lose their responses"]),
    ({**CURRICULUM, **TOKENS, "train_tokens": 10**6, "lr_warmup_samples": 10, "lr_decay_tokens": 10**6},
     ["--lr-warmup-samples = 10", "samples have no fixed number of tokens", "all its lengths in tokens"]),
    ({**CURRICULUM, "lr_warmup_iters": 0, "lr_decay_samples": 1000, "lr_warmup_tokens": 10},
     ["--lr-warmup-tokens = 10", "all its lengths in samples"]),
]


@pytest.mark.parametrize(("changes", "fragments"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_cannot_run_is_refused(changes: dict[str, Any], fragments: list[str]) -> None:
    said = violations(with_settings(**changes), 2)
    assert any(all(fragment in text for fragment in fragments) for text in said), said


def test_lengths_in_tokens_do_not_stumble_over_a_list_that_is_none() -> None:
    wrong = {**TOKENS, "train_tokens": 10**6, "random_ltd_length_list": "x", "random_ltd_start_length": None,
             "random_ltd_steps": None}
    for curriculum in ({}, CURRICULUM):
        assert any("--random-ltd-length-list = 'x'" in text for text in violations(with_settings(
            **wrong, **curriculum), 1))


@pytest.mark.parametrize("changes", [
    {"layer_drop_rate": 0.5}, {"layer_drop_rate": 0.2, "layer_drop_layers": "0,3-5", "random_ltd": False},
    {"layer_drop_rate": 0.2, **TOKENS, "train_tokens": 10**6}, {"pld_theta": 0.5, "drop_backward_rate": 0.5},
    {"raptr_stages": "0:2,9:24", "drop_backward_rate": 0.5}, CURRICULUM, {**CURRICULUM, "random_ltd": False},
    {**ROUTED, **CURRICULUM, "mixture_of_depths_strata": 4, "drop_backward_rate": 0.1},
    {**CURRICULUM, "layer_drop_rate": 0.2}, {**CURRICULUM, "seq_length_curriculum_start_length": 256},
    {**CURRICULUM, **TOKENS, "train_tokens": 10**6, "lr_warmup_tokens": 1000},
    {**CURRICULUM, **TOKENS, "train_tokens": 10**6, "token_budget": "layer", "layer_token_lr": True},
    {**CURRICULUM, "lr_warmup_iters": 0, "lr_decay_samples": 1000, "lr_warmup_samples": 10},
], ids=str)
def test_what_can_run_is_accepted(changes: dict[str, Any]) -> None:
    assert violations(with_settings(**changes), 1) == []


def test_settings_without_effect_are_named() -> None:
    assert idle_settings(with_settings(mixture_of_depths_every=3)) == [
        "--mixture-of-depths-every has no effect without --mixture-of-depths-capacity"]
    assert idle_settings(with_settings(layer_drop_layers="1")) == [
        "--layer-drop-layers has no effect without --layer-drop-rate"]
    assert idle_settings(with_settings(pld_gamma=0.1, seq_length_curriculum_steps=64)) == [
        "--seq-length-curriculum-steps has no effect without --seq-length-curriculum-start-length",
        "--pld-gamma has no effect without --pld-theta"]
    (note,) = idle_settings(with_settings(seq_length_curriculum_length_step=8))
    assert note.startswith("--seq-length-curriculum-length-step has no effect without")
    assert idle_settings(with_settings(**CURRICULUM, layer_drop_rate=0.1, layer_drop_layers="1")) == []


def test_layers_that_may_be_skipped_are_all_or_the_listed_ones() -> None:
    def skippable(**settings: Any) -> list[int]:
        found = policies(with_settings(**settings))
        return [layer for layer in range(24) if found.may_skip(layer)]

    assert skippable() == skippable(layer_drop_layers="3") == []
    assert skippable(layer_drop_rate=0.1) == list(range(24))
    assert skippable(layer_drop_rate=0.1, layer_drop_layers="5,0-1") == [0, 1, 5]


class WithoutTheLast(Policy):
    """Ten steps without the last of three layers."""

    def plan(self, step: int, plan: StepPlan) -> StepPlan:
        return plan if step >= 10 else plan.with_layers([(2, replace(plan.layers[2], skipped=True))])

    def changes(self) -> tuple[int, ...]:
        return (10,)


def test_layers_that_a_schedule_skips_may_be_skipped_and_cost_nothing_meanwhile() -> None:
    found = Policies(Shape("gpt", 3, 256), (WithoutTheLast(),))
    assert [found.may_skip(layer) for layer in range(3)] == [False, False, True]
    config = with_settings(num_layers=3, random_ltd=False)
    *before, last = layer_costs(config, found.plan(0))
    assert last == 0 and before == layer_costs(config, found.plan(10))[:2] and before[0] > 0


def test_the_length_grows_linearly_in_whole_multiples() -> None:
    """64 + 192 t / 30, rounded down to multiples of 64."""
    found = policies(with_settings(**CURRICULUM))
    lengths = [found.plan(step).read_tokens for step in (0, 9, 10, 19, 20, 29, 30, 1000)]
    assert lengths == [64, 64, 128, 128, 192, 192, 256, 256]


def closed_forms(**changes: Any) -> LayerTokens:
    return layer_tokens(with_settings(**CURRICULUM, **changes), 1)


def test_raw_and_layer_tokens_by_hand() -> None:
    """48 samples a step; 22 of 24 layers keep 96 tokens, or all of the 64 that are read in the first ten steps."""
    tokens = closed_forms(random_ltd_steps=None, random_ltd_start_length=96)
    assert tokens.raw_after(25) == 48 * (10 * 64 + 10 * 128 + 5 * 192)
    assert tokens.sum_after(25) == 48 * (10 * 24 * 64 + 10 * (2 * 128 + 22 * 96) + 5 * (2 * 192 + 22 * 96))


def test_a_budget_in_raw_tokens_counts_what_is_read() -> None:
    """30 steps read 48 x 10 x 384 tokens, and each further one 48 x 256."""
    budget = 48 * (10 * (64 + 128 + 192) + 5 * 256)
    for extra, steps in ((0, 35), (-1, 34), (48 * 256 - 1, 35)):
        config = with_settings(**CURRICULUM, **TOKENS, train_tokens=budget + extra)
        assert total_steps(config, 1) == steps
    layered = with_settings(**CURRICULUM, **TOKENS, train_tokens=budget, token_budget="layer", random_ltd=False)
    assert total_steps(layered, 1) == 35


def test_a_learning_rate_in_raw_tokens_follows_what_is_read() -> None:
    config = with_settings(**CURRICULUM, **TOKENS, train_tokens=48 * (3840 + 5 * 256), lr_warmup_tokens=48 * 128)
    assert learning_rate_spans(config, 1).decay == 48 * (3840 + 5 * 256)
    rate = LearningRate.of_run(config, 1)
    assert [rate.at(step, 48 * step, 48) for step in (0, 1)] == pytest.approx([0.5e-3, 1e-3])
    # A quarter of what follows the warm-up has been read before step 16: 10 x 64 + 6 x 128 tokens of each sample.
    share = (10 * 64 + 6 * 128 - 128) / (3840 + 5 * 256 - 128)
    assert rate.at(16, 48 * 16, 48) == pytest.approx(1e-3 * (1 - share))
    # A run that counted otherwise goes on from its counters.
    assert rate.at(16, 48 * 16, 48, raw_tokens=(48 * 128, 48 * 256)) == pytest.approx(1e-3)


def test_work_of_the_stages_is_that_of_the_lengths_and_of_the_layers_that_are_likely_to_run() -> None:
    config = with_settings(**CURRICULUM, random_ltd=False, train_iters=40, vocab_size=1000)
    works = {plan_of(length, 24): 480 for length in (64, 128, 192, 256)}
    assert plan_samples(config, 1) == works
    assert head_cost(config, plan_of(64, 24)) == 3 * 2 * 64 * 96 * 1000
    short, full = layer_costs(config, plan_of(64, 24)), layer_costs(config, plan_of(256, 24))
    pairs = {64: 64 * 65 // 2, 256: 256 * 257 // 2}
    matrices = 2 * 96 * (4 * 96 + 2 * 384)
    assert short == [3 * (64 * matrices + 4 * 96 * pairs[64])] * 24
    assert full == [3 * (256 * matrices + 4 * 96 * pairs[256])] * 24
    skipping = with_settings(config, layer_drop_rate=0.25, layer_drop_layers="0-1")
    assert layer_costs(skipping, plan_of(256, 24)) == [full[0] * 3 // 4] * 2 + full[2:]


def test_compiled_layers_have_room_for_the_lengths_of_the_curriculum() -> None:
    assert policies(with_settings(**CURRICULUM, random_ltd=False)).lengths() == {64, 128, 192, 256}
    # 64, 96, 112, ... 256: what is kept of what is read, and the lengths of the curriculum; by the time that more than
    # 64 tokens are read, 96 are kept.
    assert policies(with_settings(**CURRICULUM)).lengths() == {64, *range(96, 257, 16)}


def test_a_budget_in_raw_tokens_counts_the_text_of_bags() -> None:
    """20 steps read 48 samples of 2 x 256 tokens, each further one 48 x 256; with the same text every step is alike."""
    bags = {"token_superposition": 2, "token_superposition_steps": 20, **TOKENS, "train_tokens": 48 * 256 * 45}
    assert total_steps(with_settings(**bags, token_superposition_text="more"), 1) == 25
    assert total_steps(with_settings(**bags), 1) == 45
    config = with_settings(**bags, token_superposition_text="more", lr_warmup_tokens=48 * 256 * 4)
    assert violations(config, 1) == []
    assert LearningRate.of_run(config, 1).at(0, 0, 48) == pytest.approx(0.5e-3)
