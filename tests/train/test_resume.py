"""A run that was stopped, killed or moved to another layout goes on as if nothing had happened.

On the same layout the finished run is bit for bit the uninterrupted one: every number of the metrics file but times,
and every tensor of the last checkpoint. On another layout the curve is equal to 1e-5, as between any two layouts.
"""

import itertools
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ltd.model import init
from megatron_ltd.parallel.layers import local
from megatron_ltd.train import trainer
from megatron_ltd.train.result import StepResult
from megatron_ltd.train.setup import Model
from tests.gloo import RankFailure, launch_ranks
from tests.train.launchers import exit_record
from tests.train.moments import pretrain_with_signal
from tests.train.runs import (
    TINY,
    Corpus,
    Ending,
    Run,
    Settings,
    curve,
    pretrain,
    read_lines,
    run,
    saved_tensors,
)

STEPS = 12

SHORT = {**TINY, "train_iters": STEPS, "random_ltd_steps": 10, "eval_interval": 4, "save_interval": 4}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
ZBV = {**PP2, "pipeline_schedule": "zbv"}
ZERO_3 = {"data_parallel_sharding_strategy": "optim_grads_params"}
IMPORTANCE = {"random_ltd": False, "token_drop_policy": "importance", "token_drop_beta": 0.5,
              "random_ltd_layers": "1-4"}
RAMP = {"rampup_batch_size": (4, 4, 16), "train_iters": None, "train_samples": 80}


def continued(corpus: Corpus, folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings of a run that saves into `folder` and goes on from there."""
    checkpoints = str(folder / "checkpoints")
    return {**SHORT, **corpus.settings, "save": checkpoints, "load": checkpoints, **settings}


def assert_same_tensors(folder: Path, truth: Path, step: int) -> None:
    found, wanted = (saved_tensors(place / "checkpoints", step) for place in (folder, truth))
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


def launch_mortal(folder: Path, settings: Settings, world_size: int, victim: int, deadly: int | None) -> int | None:
    """Run to the end, or until the victim is killed at moment `deadly` and the others with it.

    Returns:
        the number of the victim's moments; None if it died.
    """
    settings = {**settings, "metrics_file": str(folder / "metrics.jsonl")}
    arguments = (settings, folder, victim, int(signal.SIGKILL), "any", deadly)
    try:
        answers = launch_ranks(pretrain_with_signal, world_size, *arguments, timeout=120)
    except RankFailure as failure:
        assert f"--- rank {victim} ---\ndied with exit code -9" in str(failure)
        return None
    assert [ending.code for ending, _ in answers] == [0] * world_size, answers[0][0].said
    return int(answers[victim][1])


KILLS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp": (2, {**TP2_SP, **DROPOUT}),
    "pp2-zbv-async": (2, {**ZBV, "async_save": True}),
    "dp2-zero3-async-ramp": (2, {**ZERO_3, **RAMP, "async_save": True, "num_workers": 1}),
    "tp2-pp2": (4, {**PP2, "tensor_model_parallel_size": 2}),
    "pp2-importance-async": (2, {**PP2, **IMPORTANCE, "async_save": True}),
    "dp2-zero2-muon": (2, {"optimizer": "muon", "use_distributed_optimizer": True}),
}


@pytest.mark.parametrize("case", KILLS)
def test_a_run_whose_ranks_are_killed_again_and_again_finishes_as_the_uninterrupted_one(
    corpus: Corpus, tmp_path: Path, case: str,
) -> None:
    world_size, layout = KILLS[case]
    chance = random.Random(case)
    truth, folder = tmp_path / "truth", tmp_path / "killed"
    truth.mkdir()
    folder.mkdir()
    victim = chance.randrange(world_size)
    moments = launch_mortal(truth, continued(corpus, truth, **layout), world_size, victim, None)
    assert moments is not None and moments > 30
    settings = continued(corpus, folder, **layout)
    # Anywhere on the way, up to the last save; and once more soon after the restart, or a little later.
    first, second = chance.randrange(1, moments * 9 // 10), chance.randrange(1, moments // 2)
    assert launch_mortal(folder, settings, world_size, victim, first) is None, first
    launch_mortal(folder, settings, world_size, victim, second)
    assert launch_mortal(folder, settings, world_size, victim, None) is not None
    lines, wanted = (read_lines(place / "metrics.jsonl") for place in (folder, truth))
    assert curve(lines) == curve(wanted), (first, second)
    assert_same_tensors(folder, truth, lines[-1]["step"])
    assert not list((folder / "checkpoints").glob(".*-iter_*"))


Legs = list[tuple[int, dict[str, Any]]]
LEGS: dict[str, tuple[dict[str, Any], Legs]] = {
    "gpt2": ({}, [(2, TP2_SP), (2, PP2), (2, ZERO_3), (1, {}), (4, {**TP2_SP, **ZBV})]),
    "gpt2-dropout-ramp-async": ({**DROPOUT, "rampup_batch_size": (4, 4, 24), "async_save": True},
                                [(2, {"use_distributed_optimizer": True}), (2, ZBV), (1, {}), (2, TP2_SP),
                                 (2, {"micro_batch_size": 1})]),
    "gpt2-importance": (IMPORTANCE, [(2, PP2), (2, TP2_SP), (1, {})]),
    "muon": ({"optimizer": "muon", "layer_drop_rate": 0.2, "group_query_attention": True, "num_query_groups": 1},
             [(2, ZBV), (4, {**TP2_SP, **ZERO_3}), (1, {"micro_batch_size": 4}), (2, {})]),
    "llama": ({"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "init_method_std": 0.1,
               "disable_bias_linear": True, "untie_embeddings_and_output_weights": True},
              [(2, ZBV), (4, {**TP2_SP, **ZERO_3}), (1, {"micro_batch_size": 4})]),
}


@pytest.mark.parametrize("case", LEGS)
def test_a_run_that_changes_its_layout_at_every_stop_keeps_its_curve(
    corpus: Corpus, tmp_path: Path, case: str,
) -> None:
    model, legs = LEGS[case]
    stride = 4
    model = {**model, "train_iters": stride * len(legs), "random_ltd_steps": stride * len(legs) - 3}
    whole = run(make(tmp_path / "truth"), {**SHORT, **corpus.settings, **model, "save_interval": None})
    folder = make(tmp_path / "moved")
    kept: dict[tuple[int, int], list[int]] = {}
    for number, (world_size, layout) in enumerate(legs, start=1):
        settings = continued(corpus, folder, **{**model, "save_interval": None, "exit_interval": stride, **layout})
        leg = run(folder, settings, world_size, code=0 if number == len(legs) else 11)
        kept |= leg.kept
    assert [line["step"] for line in leg.lines] == [line["step"] for line in whole.lines]
    for line, wanted in zip(leg.lines, whole.lines, strict=True):
        for name in ("lm_loss", "validation_loss"):
            assert line.get(name) == (pytest.approx(wanted[name], rel=1e-5, abs=0.0) if name in wanted else None)
        for name in ("consumed_samples", "consumed_layer_tokens", "learning_rate", "kept_length", "cumulative_saving"):
            assert line.get(name) == wanted.get(name), (name, wanted["step"])
    assert kept == whole.kept
    attempts = read_lines(folder / "checkpoints" / "attempts.jsonl")
    assert [(attempt["step"], attempt["processes"]) for attempt in attempts] == [
        (stride * number, world_size) for number, (world_size, _) in enumerate(legs)]
    assert attempts[0]["previous"] is None and {attempt["previous"]["code"] for attempt in attempts[1:]} == {11}


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """An uninterrupted run on one process, with checkpoints of steps 4, 8 and 12. --load = --save, and empty."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder, continued(corpus, folder))


@pytest.fixture
def copy(finished: tuple[Path, Run], tmp_path: Path) -> Path:
    """A copy of its folder that a test may change."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


Finished = tuple[Path, Run]


def test_an_empty_folder_that_is_loaded_and_saved_into_starts_a_run(finished: Finished) -> None:
    folder, whole = finished
    assert [line["step"] for line in whole.steps] == list(range(1, STEPS + 1))
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == f"{STEPS}\n"


def test_a_finished_run_that_is_started_again_changes_nothing(corpus: Corpus, finished: Finished, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copy / "checkpoints").rglob("*.safetensors")}
    again = run(copy, continued(corpus, copy))
    assert curve(again.lines) == curve(finished[1].lines)
    assert {path: path.stat().st_mtime_ns for path in (copy / "checkpoints").rglob("*.safetensors")} == before


def test_an_older_checkpoint_can_be_named_and_the_curve_after_it_is_made_anew(
    corpus: Corpus, finished: Finished, copy: Path,
) -> None:
    again = run(copy, continued(corpus, copy, ckpt_step=4))
    assert min(sample for _, sample in again.endings[0].kept) == 4 * SHORT["global_batch_size"]
    assert curve(again.lines) == curve(finished[1].lines)
    assert_same_tensors(copy, finished[0], STEPS)


def test_the_model_can_be_taken_from_the_checkpoint(corpus: Corpus, finished: Finished, copy: Path) -> None:
    model = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "make_vocab_size_divisible_by")
    again = run(copy, continued(corpus, copy, ckpt_step=8, use_checkpoint_args=True, **dict.fromkeys(model)))
    assert curve(again.lines) == curve(finished[1].lines)
    assert_same_tensors(copy, finished[0], STEPS)


def continue_from(finished: Finished, corpus: Corpus, folder: Path, **settings: Any) -> Run:
    """A run in its own folder that starts from the checkpoints of the finished one."""
    load = str(finished[0] / "checkpoints")
    return run(make(folder), continued(corpus, folder, **{"load": load, "ckpt_step": 8, **settings}))


def test_fine_tuning_starts_a_new_run_from_the_weights(corpus: Corpus, finished: Finished, tmp_path: Path) -> None:
    tuned = continue_from(finished, corpus, tmp_path / "tuned", finetune=True)
    first = finished[1].steps[0]
    for name in ("step", "consumed_samples", "learning_rate", "kept_length"):
        assert [line[name] for line in tuned.steps] == [line[name] for line in finished[1].steps]
    assert tuned.steps[0]["lm_loss"] < first["lm_loss"] - 0.3
    assert (tmp_path / "tuned" / "checkpoints" / "iter_0000012").is_dir()
    # The weights are those of the checkpoint: after a step of no length, they validate as they did then.
    still = continue_from(finished, corpus, tmp_path / "still", finetune=True, train_iters=1, lr=1e-30,
                          lr_warmup_iters=None)
    [then] = [line["validation_loss"] for line in finished[1].lines
              if line["step"] == 8 and "validation_loss" in line]
    assert still.column("validation_loss") == [then]


def test_without_optimizer_state_the_steps_go_on_and_the_moments_start_anew(
    corpus: Corpus, finished: Finished, tmp_path: Path,
) -> None:
    truth = finished[1].steps[8:]
    found = continue_from(finished, corpus, tmp_path / "given", no_load_optim=True).steps
    assert [line["step"] for line in found] == [line["step"] for line in truth]
    assert found[0]["lm_loss"] == truth[0]["lm_loss"] and found[0]["learning_rate"] == truth[0]["learning_rate"]
    assert found[1]["lm_loss"] != truth[1]["lm_loss"]
    # The same from a checkpoint that has none.
    folder = tmp_path / "bare"
    run(make(folder), continued(corpus, folder, no_save_optim=True, exit_interval=8), code=11)
    assert not [name for name in saved_tensors(folder / "checkpoints", 8) if name.startswith("optimizer.")]
    with_moments = run(folder, continued(corpus, folder), code=22)
    assert "optimizer.exp_avg.embedding.word.weight is not in the checkpoint" in with_moments.endings[0].said
    bare = run(folder, continued(corpus, folder, no_load_optim=True)).steps[8:]
    assert curve(bare) == curve(found)


def test_the_state_of_another_optimizer_is_rejected_and_without_it_the_run_continues(
    corpus: Corpus, finished: Finished, copy: Path,
) -> None:
    rejected = run(copy, continued(corpus, copy, optimizer="muon"), code=22)
    for words in ("holds the state of --optimizer adam", "this run has --optimizer muon", "--no-load-optim"):
        assert words in rejected.endings[0].said
    found = run(copy, continued(corpus, copy, ckpt_step=8, optimizer="muon", no_load_optim=True)).steps
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert found[8]["lm_loss"] == finished[1].steps[8]["lm_loss"]
    moments = {name.split(".")[1] for name in saved_tensors(copy / "checkpoints", STEPS)
               if name.startswith("optimizer.")}
    assert moments == {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def test_a_new_run_sets_the_metrics_of_an_older_one_aside(corpus: Corpus, finished: Finished, copy: Path) -> None:
    before = read_lines(copy / "metrics.jsonl")
    fresh = run(copy, {**SHORT, **corpus.settings, "save": str(copy / "new"), "exit_interval": 2}, code=11)
    assert [line["step"] for line in fresh.steps] == [1, 2]
    assert read_lines(copy / "metrics.jsonl.1") == before


@pytest.mark.parametrize("change", [
    {"lr": 1e-3}, {"seed": 8}, {"random_ltd_start_length": 16}, {"global_batch_size": 16},
], ids=str)
def test_settings_that_change_the_curve_are_told_when_a_run_goes_on_with_them(
    corpus: Corpus, copy: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any],
) -> None:
    with mock.patch.object(init, "initial_value", side_effect=AssertionError("weights are drawn that are loaded next")):
        ending = pretrain(0, 1, "", continued(corpus, copy, **{**change, "ckpt_step": 8, "exit_interval": 1}))
    [(name, value)] = change.items()
    assert ending.code == 11
    flag = "--" + name.replace("_", "-")
    assert f"continuing with {flag} = {value}; it was {SHORT[name]}" in capfd.readouterr().out


def test_a_batch_size_that_follows_from_the_number_of_processes_is_told_when_it_changes(
    corpus: Corpus, copy: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    ending = pretrain(0, 1, "", continued(corpus, copy, global_batch_size=None, ckpt_step=8, exit_interval=1))
    assert ending.code == 11
    samples = SHORT["micro_batch_size"]
    assert (f"continuing with {samples} samples a step, which follow from --micro-batch-size and 1 data-parallel "
            f"processes; the 8 steps so far have read {8 * SHORT['global_batch_size']} samples"
            ) in capfd.readouterr().out


@pytest.mark.parametrize(("budget", "batch", "steps"), [
    ({"train_samples": 96}, 16, 10), ({"train_tokens": 96 * 32}, 4, 16), ({"train_iters": STEPS}, 4, STEPS),
], ids=str)
def test_a_run_that_goes_on_with_another_batch_size_ends_with_its_budget(
    finished: Finished, corpus: Corpus, tmp_path: Path, budget: dict[str, int], batch: int, steps: int,
) -> None:
    """After 8 steps of 8 samples; the last of the steps has the least learning rate, as in any run."""
    changed = {"train_iters": None, **budget, "global_batch_size": batch, "mock_data": True, "data_path": None}
    found = continue_from(finished, corpus, tmp_path / "other", **changed)
    assert found.steps[-1]["step"] == steps
    assert found.steps[-1]["consumed_samples"] == 64 + (steps - 8) * batch
    assert found.steps[-1]["learning_rate"] == min(found.column("learning_rate"))


def pretrain_until_it_diverges(rank: int, world_size: int, init_method: str, settings: Settings, step: int) -> Ending:
    """`pretrain` on a slow disk, with weights that are no numbers from some step on."""
    plain, flush = trainer.train_step, os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(0.4)
        flush(descriptor)

    def train_step(model: Model, *args: Any, **kwargs: Any) -> StepResult:
        if next(steps) == step:
            with torch.no_grad():
                local(model.parameters[0].parameter)[:] = math.nan
        return plain(model, *args, **kwargs)

    steps = itertools.count(1)
    with mock.patch.object(trainer, "train_step", train_step), mock.patch.object(os, "fsync", fsync):
        return pretrain(rank, world_size, init_method, settings)


def test_a_run_that_diverges_keeps_the_checkpoint_that_it_was_writing(corpus: Corpus, tmp_path: Path) -> None:
    """The host learns of it while the next step runs, and reports the step that was not applied."""
    settings = continued(corpus, tmp_path, **ZBV, async_save=True, metrics_file=str(tmp_path / "metrics.jsonl"),
                         log_interval=3)
    endings = launch_ranks(pretrain_until_it_diverges, 2, settings, 5, timeout=120)
    assert [ending.code for ending in endings] == [30, 30]
    assert "step 5: loss nan" in endings[0].said and "Continue from the checkpoint of step 4" in endings[0].said
    record = exit_record(tmp_path / "checkpoints")
    assert record["step"] == 5 and record["reason"].startswith("step 5: loss nan")
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert lines[-1]["step"] == 5 and math.isnan(lines[-1]["lm_loss"]) and lines[-1]["skipped"] is True
    assert saved_tensors(tmp_path / "checkpoints", 4)
    whole = run(make(tmp_path / "whole"), continued(corpus, tmp_path / "whole", **ZBV, log_interval=3), 2)
    assert curve(run(tmp_path, settings, 2).lines) == curve(whole.lines)
