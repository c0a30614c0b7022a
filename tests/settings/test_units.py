"""Lengths in several units: the first budget ends the run, and the learning rate's lengths are converted."""

from pathlib import Path

import pytest

from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import total_steps
from megatron_ltd.plan.learning_rate import learning_rate_spans
from megatron_ltd.settings.checks.all import notes, violations
from megatron_ltd.settings.cli import parse_run_config

SHAPE = ("--mock-data --vocab-size 100 --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
         "--lr 1e-3 --micro-batch-size 2 --global-batch-size 4")
DROPPING = "--random-ltd --random-ltd-start-length 16 --random-ltd-steps 12 --random-ltd-length-step 16"


def config_of(words: str) -> RunConfig:
    config, _ = parse_run_config(f"{SHAPE} {words}".split())
    assert violations(config, 1) == []
    return config


@pytest.mark.parametrize(("budgets", "steps"), [
    ("--train-iters 9 --train-samples 100", 9), ("--train-iters 90 --train-samples 100", 25),
    ("--train-samples 100 --train-tokens 2560", 10), ("--train-iters 7 --train-samples 100 --train-tokens 2560", 7),
])
def test_of_several_budgets_the_one_that_is_used_up_first_ends_the_run(budgets: str, steps: int) -> None:
    config = config_of(budgets)
    assert total_steps(config, 1) == steps
    (note,) = notes(config, 1)
    assert note.endswith("the run ends with the budget that is used up first")


def test_a_warm_up_in_steps_is_converted_to_the_layer_tokens_of_these_steps() -> None:
    config = config_of(f"{DROPPING} --train-tokens 4000 --token-budget layer --layer-token-lr --lr-warmup-iters 7")
    kept = [16 + (64 - 16) * step // 12 // 16 * 16 for step in range(7)]
    by_hand = sum(4 * (2 * 64 + 2 * k) for k in kept) / 4  # two of the four layers drop
    spans = learning_rate_spans(config, 1)
    assert (spans.unit, spans.warmup) == ("layer tokens", by_hand)
    assert "--lr-warmup-iters = 7: converted to layer tokens, in which the learning rate is counted" in notes(config, 1)


@pytest.mark.parametrize(("lengths", "unit", "warmup"), [
    ("--lr-decay-samples 400 --lr-warmup-iters 10", "samples", 2 * 4 + 4 * 6),
    ("--lr-decay-iters 90 --lr-warmup-samples 12", "steps", 5),
    ("--lr-decay-iters 90 --lr-warmup-tokens 769", "steps", 6),
    ("--lr-decay-tokens 9000 --lr-warmup-iters 3", "tokens", 3 * 2 * 64),
])
def test_steps_and_samples_are_converted_along_the_ramp_of_the_batch(lengths: str, unit: str, warmup: float) -> None:
    config = config_of(f"--train-iters 100 --rampup-batch-size 2 2 8 {lengths}")  # four steps of 2, then of 4 samples
    spans = learning_rate_spans(config, 1)
    assert (spans.unit, spans.warmup) == (unit, warmup)


def test_a_warm_up_that_is_longer_than_the_run_is_told_with_both_numbers() -> None:
    (note,) = notes(config_of("--train-iters 40 --lr-warmup-iters 2000"), 1)
    assert "the run of 40 steps is not longer than the warm-up of 2000" in note and "--lr = 0.001" in note


def test_a_flag_displaces_what_a_file_says_in_another_unit(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("train_tokens = 1000000\nlr_warmup_tokens = 5000\nlr_decay_tokens = 900000\nsave_interval = 7\n")
    config, said = parse_run_config(["--config", str(file), "--train-iters", "12", "--lr-warmup-iters", "3"])
    assert (config.training.train_tokens, config.training.train_iters) == (None, 12)
    assert (config.optimizer.lr_warmup_tokens, config.optimizer.lr_decay_tokens) == (0, 900000)
    assert f"{file}: train_tokens = 1000000 gives way to the flag in another unit" in said
    assert any(note.startswith("--save-interval has no effect without --save") for note in said)


def test_dropping_of_a_file_that_does_not_fit_the_sizes_of_flags_is_left_out_and_told(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("random_ltd = true\nrandom_ltd_start_length = 128\nseq_length = 2048\nnum_layers = 12\n")
    config, said = parse_run_config(["--config", str(file), "--seq-length", "64"])
    assert not config.token_drop.random_ltd and config.token_drop.random_ltd_start_length is None
    (note,) = (note for note in said if "is left out" in note)
    assert "random_ltd, random_ltd_start_length" in note and "--seq-length = 64" in note
    kept, _ = parse_run_config(["--config", str(file), "--seq-length", "256"])
    assert kept.token_drop.random_ltd_start_length == 128
