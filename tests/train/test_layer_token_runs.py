"""Runs that count in layer tokens, split their pipeline by FLOPs, and say at the end what they consumed."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.flops import head_flops, layer_flops
from tests.train.runs import TINY, VOCABULARY, Corpus, curve, pretrain, read_lines, run

# A step is 8 samples of 32 tokens; 2 of 6 layers process all of them, the others 8, from step 6 on 16, from 10 on 32.
LIST = {"random_ltd_start_length": None, "random_ltd_steps": None, "random_ltd_length_list": "0:8,6:16,10:32"}
LAYER_TOKENS = [8 * (2 * 32 + 4 * kept) / 6 for kept in [8] * 6 + [16] * 4 + [32] * 10]
BY_LAYER = {**TINY, **LIST, "layer_token_lr": True, "lr_warmup_iters": 0, "lr_warmup_tokens": 512,
            "lr_decay_tokens": 2048, "lr_decay_style": "cosine", "train_iters": 14}


def rate_by_hand(step: int) -> float:
    before, after = sum(LAYER_TOKENS[:step]), sum(LAYER_TOKENS[:step + 1])
    if before <= 512:
        return 3e-3 * min(1.0, after / 512)
    share = (before - 512) / (2048 - 512)
    return 3e-3 * 0.5 * (math.cos(math.pi * share) + 1.0) if before <= 2048 else 0.0


def test_the_rate_follows_the_layer_tokens_and_goes_on_exactly_after_a_stop(corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**BY_LAYER, **corpus.settings}
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", settings)
    assert whole.column("learning_rate") == pytest.approx([rate_by_hand(step) for step in range(14)], rel=1e-9)
    assert min(whole.column("learning_rate")[:12]) > 0.0
    consumed = [sum(LAYER_TOKENS[:step]) for step in range(1, 15)]
    assert whole.column("consumed_layer_tokens") == [int(tokens + 1e-9) for tokens in consumed]
    folder = str(tmp_path / "checkpoints")
    run(tmp_path, {**settings, "save": folder, "exit_interval": 8}, code=11)
    run(tmp_path, {**settings, "save": folder, "load": folder})
    assert curve(read_lines(tmp_path / "metrics.jsonl")) == curve(whole.lines)


def test_a_budget_in_layer_tokens_ends_the_run_where_the_next_step_would_pass_it(
        corpus: Corpus, tmp_path: Path) -> None:
    settings = {**TINY, **LIST, **corpus.settings, "train_iters": None, "train_tokens": 1000, "token_budget": "layer",
                "lr_warmup_iters": 0, "rampup_batch_size": (4, 4, 16)}
    lines = run(tmp_path, settings).steps
    # 4 samples a step for the first 16, then 8; 16 layer tokens a sample, from step 6 on 21 and a third.
    assert [line["global_batch_size"] for line in lines] == [4] * 4 + [8] * 4
    assert lines[-1]["consumed_layer_tokens"] == 4 * 64 + 2 * 128 + 341
    assert lines[-1]["consumed_tokens"] == 48 * 32
    assert 4 * 64 + 2 * 128 + 3 * 8 * 64 / 3 > 1000


def test_a_pipeline_split_by_flops_trains_as_one_process_does(corpus: Corpus, tmp_path: Path) -> None:
    settings = {**TINY, **corpus.settings, "train_iters": 6, "random_ltd_layers": "3-4"}
    alone = run(tmp_path, settings)
    for name, pipeline in {"1f1b": {}, "zbv": {"pipeline_schedule": "zbv"}}.items():
        (tmp_path / name).mkdir()
        split = run(tmp_path / name, {**settings, "pipeline_model_parallel_size": 2, "pipeline_split": "auto",
                                      **pipeline}, 2)
        assert split.column("lm_loss") == pytest.approx(alone.column("lm_loss"), rel=1e-5)
        assert split.kept == alone.kept


@pytest.mark.parametrize(("length_list", "said"), [
    ("0:8,6:32", "time saved: "), ("0:8", "time saved: not measured, since this process timed no step at the full")])
def test_a_run_ends_with_what_it_consumed_and_saved(
        corpus: Corpus, tmp_path: Path, length_list: str, said: str) -> None:
    settings = {**BY_LAYER, **corpus.settings, "train_iters": 9, "random_ltd_length_list": length_list,
                "metrics_file": str(tmp_path / "metrics.jsonl")}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert pretrain(0, 1, "", settings).code == 0
    lines = output.getvalue().splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("consumed in"))
    consumed, saved = lines[at:at + 2]
    last = [line for line in read_lines(tmp_path / "metrics.jsonl") if "lm_loss" in line][-1]
    assert f"consumed in 9 steps: {9 * 8 * 32} raw tokens, {last['consumed_layer_tokens']} layer tokens" in consumed
    assert f"theoretical saving {100 * last['cumulative_saving']:.1f}%" in consumed
    assert saved.startswith(said)


def test_the_flops_of_a_cross_layer_are_counted(corpus: Corpus, tmp_path: Path) -> None:
    """With the importance policy the first dropped layer takes keys and values of the whole sample."""
    settings = {**TINY, **corpus.settings, "train_iters": 2, "lr_warmup_iters": 0, "random_ltd": False,
                "token_drop_policy": "importance",
                "random_ltd_start_length": 16, "random_ltd_steps": None, "random_ltd_layers": "2-4"}
    (line, _) = run(tmp_path, settings).steps
    model = ModelConfig(num_layers=6, hidden_size=32, num_attention_heads=4, seq_length=32, vocab_size=VOCABULARY)
    with_cross = 3 * (3 * layer_flops(model, 32) + layer_flops(model, 16, attends_to_all=True)
                      + 2 * layer_flops(model, 16) + head_flops(model))
    assert line["model_flops"] == 8 * with_cross
    full = 3 * (6 * layer_flops(model, 32) + head_flops(model))
    assert line["theoretical_saving"] == pytest.approx(1.0 - with_cross / full)
    assert line["consumed_layer_tokens"] == 8 * (3 * 32 + 3 * 16) // 6
