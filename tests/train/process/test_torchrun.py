"""The commands of the documentation, through torchrun: train, be stopped, go on elsewhere, evaluate."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.train.launchers import ROOT, environment, exit_record, finish, start, torchrun, wait_for_step
from tests.train.runs import TINY, Corpus, read_lines, run, words
from tools import evaluate_zeroshot

SETTINGS = {**TINY, "train_iters": 400, "eval_interval": 1000, "seq_length": 64, "random_ltd_start_length": 16}
"""A run that is stopped long before its end."""

PASSAGES = ["the value of the object is the value of the name", "a class is a kind of type and not a function",
            "the statement is executed and the name is bound"]


def test_a_run_under_torchrun_is_stopped_and_goes_on_with_another_layout(corpus: Corpus, tmp_path: Path) -> None:
    checkpoints, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    settings = {**SETTINGS, **corpus.settings, "save": str(checkpoints), "load": str(checkpoints),
                "metrics_file": str(metrics)}
    pretrain = ["-m", "megatron_ltd.pretrain_gpt"]

    # Tensor x pipeline parallel, until the launcher is told to end: it passes the signal on and reports an error.
    first = start(torchrun(4, *pretrain, *words({**settings, "tensor_model_parallel_size": 2,
                                                 "pipeline_model_parallel_size": 2})), tmp_path / "first.log")
    wait_for_step(metrics, 3, first)
    first.send_signal(signal.SIGTERM)
    code, said = finish(first), (tmp_path / "first.log").read_text()
    record = exit_record(checkpoints)
    assert code != 0 and record["code"] == 10, said
    stopped_at = record["step"]
    assert 3 <= stopped_at < 400
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == f"{stopped_at}\n"
    assert "tp 2 x pp 2 x dp 1" in said and "lm loss:" in said and "kept length:" in said

    # Data x pipeline parallel, until the next multiple of 25 steps.
    second = start(torchrun(4, *pretrain, *words({**settings, "exit_interval": 25, "pipeline_schedule": "zbv",
                                                  "pipeline_model_parallel_size": 2, "micro_batch_size": 1,
                                                  "use_distributed_optimizer": True})), tmp_path / "second.log")
    finish(second)
    said = (tmp_path / "second.log").read_text()
    record = exit_record(checkpoints)
    assert record["code"] == 11 and record["step"] == (stopped_at // 25 + 1) * 25, said
    assert "tp 1 x pp 2 x dp 2" in said

    # The curve is that of one process which was never stopped.
    truth = run(make(tmp_path / "truth"), {**SETTINGS, **corpus.settings, "exit_interval": record["step"]}, code=11)
    lines = read_lines(metrics)
    assert [line["step"] for line in lines] == list(range(1, record["step"] + 1))
    for line, wanted in zip(lines, truth.lines, strict=True):
        assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], rel=1e-5, abs=0.0), wanted["step"]


def test_ctrl_c_lets_torchrun_save(corpus: Corpus, tmp_path: Path) -> None:
    checkpoints, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    settings = {**SETTINGS, **corpus.settings, "save": str(checkpoints), "metrics_file": str(metrics)}
    launcher = start(torchrun(2, "-m", "megatron_ltd.pretrain_gpt", *words(settings)), tmp_path / "log")
    wait_for_step(metrics, 2, launcher)
    launcher.send_signal(signal.SIGINT)
    finish(launcher)
    said, record = (tmp_path / "log").read_text(), exit_record(checkpoints)
    assert record["code"] == 10 and record["reason"] == "stopped by a signal", said
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == f"{record['step']}\n"


def test_a_run_whose_reader_goes_away_is_finished(corpus: Corpus, tmp_path: Path) -> None:
    settings = {**SETTINGS, **corpus.settings, "train_iters": 10, "random_ltd_steps": 8, "save": "checkpoints",
                "metrics_file": "metrics.jsonl"}
    command = torchrun(2, "-m", "megatron_ltd.pretrain_gpt", *words(settings))
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as launcher:
        assert launcher.stdout is not None and launcher.stderr is not None
        first = launcher.stdout.readline()
        launcher.stdout.close()
        said = launcher.stderr.read()
    assert first and said.count("WARNING: standard output is given up for this run: [Errno 32] Broken pipe") == 1, said
    assert launcher.returncode == 0, said
    assert exit_record(tmp_path / "checkpoints") == {"code": 0, "step": 10, "reason": "complete"}
    assert len([line for line in read_lines(tmp_path / "metrics.jsonl") if "lm_loss" in line]) == 10


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_an_evaluation_under_torchrun_gives_the_numbers_of_one_process(corpus: Corpus, tmp_path: Path) -> None:
    checkpoints, passages = tmp_path / "checkpoints", tmp_path / "passages.jsonl"
    run(tmp_path, {**SETTINGS, **corpus.settings, "save": str(checkpoints), "exit_interval": 15}, code=11)
    passages.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    flags = ["--load", str(checkpoints), "--tasks", f"lambada={passages},perplexity={passages}"]
    alone, spread, log = tmp_path / "alone.json", tmp_path / "spread.json", tmp_path / "log"

    assert evaluate_zeroshot.main([*flags, "--output", str(alone), "--micro-batch-size", "1"]) == 0
    command = [str(ROOT / "tools" / "evaluate_zeroshot.py"), *flags, "--output", str(spread),
               "--tensor-model-parallel-size", "2"]
    assert finish(start(torchrun(4, *command), log)) == 0, log.read_text()
    assert "| lambada" in log.read_text() and "step 15" in log.read_text()

    found, wanted = (json.loads(path.read_text()) for path in (spread, alone))
    assert found["model"] == wanted["model"] and found["model"]["step"] == 15
    assert found["tasks"]["lambada"]["n"] == len(PASSAGES)
    for task in ("lambada", "perplexity"):
        metrics = wanted["tasks"][task]["metrics"]
        assert found["tasks"][task]["metrics"].keys() == metrics.keys()
        for name, metric in metrics.items():
            assert found["tasks"][task]["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-5), name
    assert wanted["tasks"]["perplexity"]["metrics"]["token_perplexity"]["value"] < 320


def test_what_a_user_can_repair_reaches_the_terminal_through_torchrun(corpus: Corpus, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    settings = {**SETTINGS, **corpus.settings, "save": str(checkpoints), "load": str(tmp_path / "nothing")}
    log = tmp_path / "log"
    code = finish(start(torchrun(2, "-m", "megatron_ltd.pretrain_gpt", *words(settings)), log))
    assert code != 0
    said, _, cause = log.read_text().partition("Root Cause")
    assert sum(line.startswith("CheckpointError: ") for line in said.splitlines()) == 1  # printed by one process
    assert "traceback : CheckpointError: no checkpoint to load" in cause  # torch's report ends with the reason
    assert f"--load = {tmp_path / 'nothing'} is not a folder" in log.read_text()
    assert exit_record(checkpoints)["code"] == 22
