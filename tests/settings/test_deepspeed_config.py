"""DeepSpeed's file, as published runs pass it, and everything that can be wrong with it."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.config.run import TokenDropConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import policies
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.settings.deepspeed_file import deepspeed_settings, layer_text
from megatron_ltd.token_drop.lists import parse_layer_list

BLOCK: dict[str, Any] = {
    "enabled": True, "total_layer_num": 24, "random_ltd_layer_num": 22, "random_ltd_layer_id": list(range(1, 23)),
    "model_mask_name": "attention_mask", "model_type": "decoder", "hidden_state_order": "seq_batch_dim",
    "random_ltd_schedule": {"min_value": 128, "max_value": 2048, "schedule_type": "fixed_linear",
                            "schedule_config": {"require_steps": 200_000, "seq_per_step": 16}}}
WORDS = ["--num-layers", "24", "--seq-length", "2048", "--random-ltd"]


def written(folder: Path, block: Any, **others: Any) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps({
        "data_efficiency": {"enabled": True, "seed": 1234, "data_routing": {"enabled": True, "random_ltd": block}},
        **others}))
    return str(path)


def refused(path: str, *words: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_run_config([*WORDS, *words, "--deepspeed-config", path])
    return str(error.value)


@pytest.mark.parametrize("flag", ["--deepspeed_config", "--deepspeed-config"])
def test_the_published_gpt_configuration_becomes_flags_and_is_echoed(tmp_path: Path, flag: str) -> None:
    path = written(tmp_path, BLOCK, train_batch_size=512, fp16={"enabled": True}, zero_optimization={"stage": 1},
                   steps_per_print=10)
    config, notes = parse_run_config([*WORDS, "--deepspeed", flag, path])
    assert config.token_drop == TokenDropConfig(
        random_ltd=True, random_ltd_start_length=128, random_ltd_steps=200_000, random_ltd_length_step=16,
        random_ltd_layers="1-22")
    plan = policies(config).plan(0)
    assert [layer for layer in range(24) if plan.layers[layer].token_set is not None] == list(range(1, 23))
    assert config.training.token_budget == "raw" and not config.optimizer.layer_token_lr
    assert notes[1:] == [
        f"{path}: not read: steps_per_print. Their counterparts are flags",
        f"{path}: taken as --global-batch-size 512 --fp16 --data-parallel-sharding-strategy optim_grads "
        "--random-ltd-start-length 128 --random-ltd-steps 200000 --random-ltd-length-step 16 --random-ltd-layers 1-22"]
    assert (config.training.global_batch_size, config.training.fp16) == (512, True)


@pytest.mark.parametrize(("content", "wanted"), [
    ({"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5, "bf16": {"enabled": True}},
     "--micro-batch-size 4 --clip-grad 0.5 --bf16"),
    ({"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": False},
      "zero_optimization": {"stage": "auto"}}, None),
    ({"zero_optimization": {"stage": 3}}, "--data-parallel-sharding-strategy optim_grads_params"),
    ({"zero_optimization": {"stage": 0}}, None),
])
def test_entries_of_the_engine_are_taken_where_they_have_a_counterpart(
        tmp_path: Path, content: dict[str, Any], wanted: str | None) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(content))
    config, notes = parse_run_config(["--deepspeed_config", str(path)])
    expected, _ = parse_run_config([] if wanted is None else wanted.split())
    assert config == expected
    assert notes[0] == (f"{path}: nothing is taken from the file" if wanted is None else f"{path}: taken as {wanted}")


@pytest.mark.parametrize(("content", "fragment"), [
    ({"train_batch_size": 1.5}, "train_batch_size = 1.5: must be a whole number"),
    ({"fp16": {"enabled": "yes"}}, "fp16.enabled = 'yes': must be true or false"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4: must be 0, 1, 2 or 3"),
    ({"zero_optimization": 2.5}, "zero_optimization.stage = 2.5: must be 0, 1, 2 or 3"),
])
def test_entries_of_the_engine_that_are_malformed_are_refused(tmp_path: Path, content: dict[str, Any],
                                                              fragment: str) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=re.escape(fragment)):
        parse_run_config(["--deepspeed_config", str(path)])


def test_token_budgets_keep_the_meaning_they_have_there(tmp_path: Path) -> None:
    """With random-LTD Megatron-DeepSpeed ends a run, and moves its learning rate, by layer-averaged tokens."""
    path = written(tmp_path, BLOCK)
    tokens = ["--train-tokens", "300000000000", "--lr-decay-tokens", "300000000000", "--lr-warmup-tokens", "3000000000"]
    config, notes = parse_run_config([*WORDS, *tokens, "--deepspeed_config", path])
    assert config.training.token_budget == "layer" and config.optimizer.layer_token_lr
    assert "--token-budget layer" in notes[-1] and "--layer-token-lr" in notes[-1]
    config, _ = parse_run_config([*WORDS, *tokens, "--token-budget", "raw", "--deepspeed_config", path])
    assert config.training.token_budget == "raw"


def test_flags_count_more_than_the_file_and_that_is_said(tmp_path: Path) -> None:
    path = written(tmp_path, BLOCK)
    config, notes = parse_run_config([*WORDS, "--random-ltd-steps", "1000", "--deepspeed-config", path])
    assert config.token_drop.random_ltd_steps == 1000 and config.token_drop.random_ltd_start_length == 128
    assert f"{path}: --random-ltd-steps = 1000 is given and counts, rather than 200000 of the file" in notes


def test_a_block_that_is_off_or_missing_changes_nothing_and_that_is_said(tmp_path: Path) -> None:
    for block in ({**BLOCK, "enabled": False}, {}):
        path = written(tmp_path, block)
        config, notes = parse_run_config([*WORDS, "--train-tokens", "5", "--deepspeed-config", path])
        assert config == parse_run_config([*WORDS, "--train-tokens", "5"])[0]
        assert notes == [f"{path}: nothing is taken from the file"]
    (tmp_path / "other.json").write_text('{"wall_clock_breakdown": 8}')
    _, notes = parse_run_config([*WORDS, "--deepspeed-config", str(tmp_path / "other.json")])
    assert len(notes) == 2 and "not read: wall_clock_breakdown" in notes[1]


def test_progressive_layer_dropping_is_taken_alone_or_beside_random_ltd(tmp_path: Path) -> None:
    (tmp_path / "pld.json").write_text('{"progressive_layer_drop": {"enabled": true, "theta": 0.5, "gamma": 0.01}}')
    config, notes = parse_run_config([*WORDS[:4], "--deepspeed-config", str(tmp_path / "pld.json")])
    assert config.token_drop == TokenDropConfig(pld_theta=0.5, pld_gamma=0.01)
    assert notes == [f"{tmp_path / 'pld.json'}: taken as --pld-theta 0.5 --pld-gamma 0.01"]
    both = written(tmp_path, BLOCK, progressive_layer_drop={"enabled": True, "theta": 1})
    config, _ = parse_run_config([*WORDS, "--deepspeed-config", both])
    assert (config.token_drop.pld_theta, config.token_drop.random_ltd_steps) == (1, 200_000)
    off = written(tmp_path, BLOCK, progressive_layer_drop={"enabled": False, "theta": 0.5})
    assert parse_run_config([*WORDS, "--deepspeed-config", off])[0].token_drop.pld_theta == 1.0
    for block, said in (({"enabled": True, "theta": "x"}, "progressive_layer_drop.theta = 'x': must be a number"),
                        ({"thata": 0.5}, "progressive_layer_drop.thata: no such key; nearest: theta"),
                        (7, "progressive_layer_drop = 7: must be an object")):
        assert said in refused(written(tmp_path, BLOCK, progressive_layer_drop=block))


def test_the_layer_token_learning_rate_that_deepspeed_only_declares_is_had_here(tmp_path: Path) -> None:
    config, _ = parse_run_config([*WORDS, "--deepspeed-config", written(
        tmp_path, {**BLOCK, "layer_token_lr_schedule": {"enabled": True}})])
    assert config.optimizer.layer_token_lr


CHANGES: list[tuple[list[str], Any, list[str]]] = [
    (["random_ltd_layer_num"], 21, ["random_ltd_layer_num = 21", "random_ltd_layer_id", "22 layers"]),
    (["random_ltd_layer_id"], [], ["random_ltd_layer_id = []", "list of layers"]),
    (["random_ltd_layer_id"], ["1"], ["random_ltd_layer_id = ['1']"]),
    (["random_ltd_layer_id"], [True, 2], ["random_ltd_layer_id"]),
    (["random_ltd_schedule", "schedule_type"], "fixed_root",
     ["'fixed_root'", "fixed_linear", "--random-ltd-root-degree"]),
    (["random_ltd_schedule", "max_value"], 1024, ["max_value = 1024", "--seq-length = 2048"]),
    (["total_layer_num"], 12, ["total_layer_num = 12", "--num-layers = 24"]),
    (["random_ltd_schedule", "min_value"], 0, ["min_value = 0", "whole number"]),
    (["random_ltd_schedule", "min_value"], 12.5, ["min_value = 12.5"]),
    (["random_ltd_schedule", "schedule_config", "require_steps"], "many", ["require_steps = 'many'"]),
    (["random_ltd_schedule", "schedule_config"], None, ["random_ltd_schedule.schedule_config = None", "object"]),
    (["random_ltd_schedule"], 7, ["random_ltd_schedule = 7", "object"]),
    (["random_ltd_layers"], 7, ["random_ltd.random_ltd_layers: no such key", "random_ltd_layer_"]),
    (["random_ltd_schedule", "min_val"], 7, ["random_ltd_schedule.min_val: no such key", "nearest: min_value"]),
    (["enabled"], "yes", ["enabled = 'yes'", "true or false"]),
]


@pytest.mark.parametrize(("keys", "value", "fragments"), CHANGES, ids=[f"{row[0][-1]}={row[1]}" for row in CHANGES])
def test_what_is_wrong_in_the_block_is_refused_with_key_value_and_remedy(
        tmp_path: Path, keys: list[str], value: Any, fragments: list[str]) -> None:
    block: dict[str, Any] = copy.deepcopy(BLOCK)
    holder = block
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    message = refused(written(tmp_path, block))
    assert message.count("ds.json") == 1, message
    assert all(fragment in message for fragment in fragments), message


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    block = {"enabled": True, "random_ltd_layer_num": 3, "random_ltd_layer_id": [1], "random_ltd_schedule": {
        "min_value": 0, "max_value": 2048, "schedule_type": "fixed_linear", "schedule_config": {"require_steps": 5}}}
    message = refused(written(tmp_path, block), "--no-such-flag")
    for fragment in ("random_ltd_layer_num = 3", "min_value = 0", "seq_per_step = None", "--no-such-flag"):
        assert fragment in message


def test_an_empty_schedule_is_refused(tmp_path: Path) -> None:
    message = refused(written(tmp_path, {**BLOCK, "random_ltd_schedule": {}}))
    assert "min_value = None" in message and "schedule_config = None: must be an object" in message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(str(tmp_path / "none.json"))
    for text, fragment in (("{", "not valid JSON"), ("[1]", "not a JSON object"), ("", "not valid JSON")):
        (tmp_path / "bad.json").write_text(text)
        assert fragment in refused(str(tmp_path / "bad.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "not valid JSON" in refused(str(tmp_path / "binary.json"))
    path = written(tmp_path, BLOCK)
    assert "more than once" in refused(path, "--deepspeed_config", path)
    assert "needs one path" in refused(path, "--deepspeed_config")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from([*BLOCK, "min_value", "schedule_config", "x"]), inner, max_size=4)))
def test_any_block_gives_settings_or_problems(tmp_path_factory: pytest.TempPathFactory, block: Any) -> None:
    added, problems, notes = deepspeed_settings(written(tmp_path_factory.mktemp("any"), block), {"seq_length": 64})
    assert problems or notes
    assert not added or added["random_ltd"]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_a_list_of_layers_is_written_as_ranges_and_read_back(layers: list[int]) -> None:
    assert list(parse_layer_list(layer_text(layers))) == layers
