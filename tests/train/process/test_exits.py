"""The words with which a run ends without an error."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_ltd.config.files import CheckpointConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.errors import EXIT_INTERNAL, EXIT_PEER_LOST, ConfigError, LostPeerError
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.exits import ending, note_attempt, report, take_exit_record, write_exit_record
from megatron_ltd.train.process.launch import choose_device


def said(code: int, step: int, first_step: int = 0, training: TrainingConfig | None = None, **checkpoint: Any) -> str:
    config = RunConfig(training=training or TrainingConfig(exit_interval=4), checkpoint=CheckpointConfig(**checkpoint))
    return ending(config, code, first_step=first_step, step=step, total_steps=12)


def test_a_run_that_is_started_again_after_its_end_is_complete_already() -> None:
    assert said(0, 12, 12, save="run", load="run").startswith("already complete: run holds step 12 of 12")
    assert said(0, 12, 8, save="run", load="run") == "complete: step 12 of 12\nnewest checkpoint: run/iter_0000012"


@pytest.mark.parametrize(("checkpoint", "command"), [
    ({"save": "run", "load": "run"}, "the same command again"),
    ({"save": "run", "load": "./run"}, "the same command again"),
    ({"save": "run"}, "the same command with --load run"),
    ({"save": "run", "load": "other", "finetune": True}, "the same command with --load run and without --finetune"),
    ({"save": "run", "load": "base", "finetune": True, "pretrained_checkpoint": "base"},
     "the same command with --load run"),
    ({"save": "run", "load": "run", "ckpt_step": 3}, "the same command without --ckpt-step"),
])
def test_the_command_that_goes_on_is_told_by_what_it_changes(checkpoint: dict[str, object], command: str) -> None:
    assert said(11, 8, **checkpoint).splitlines()[1:] == ["newest checkpoint: run/iter_0000008",
                                                          f"to continue: {command}"]


def test_a_stop_names_its_cause() -> None:
    assert said(11, 8).splitlines() == ["stopped as planned after step 8 of 12: --exit-interval = 4 (exit code 11)",
                                        "nothing was saved, since --save is not given"]
    timed = replace(TrainingConfig(exit_interval=4), exit_duration_in_mins=1.5)
    assert said(11, 7, training=timed).startswith("stopped as planned after step 7 of 12: --exit-duration-in-mins = 1")
    assert said(10, 7).startswith("stopped by a signal after step 7 of 12 (exit code 10)")


def test_a_process_that_leaves_runs_its_exit_handlers_and_is_not_finalized() -> None:
    script = ("import atexit, torch\n"
              "from megatron_ltd.train.process.exits import leave\n"
              "class Late:\n"
              "    def __del__(self): print('finalized', flush=True)\n"
              "late = Late()\n"
              "atexit.register(print, 'handler')\n"
              "print('work')\n"
              "leave(11)\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (11, "work\nhandler\n")


def test_a_process_lost_during_a_save_is_no_damaged_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    error = LostPeerError("the checkpoint of step 4 was not saved:\n  lost contact with another rank")
    assert report(error, 1, 2, None) == EXIT_PEER_LOST
    assert "rank 1: stopped, since another process failed or did not answer" in capsys.readouterr().err


def test_a_shortage_of_memory_is_answered_with_what_takes_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                               ) -> None:
    def raised(reserve: Callable[[], object]) -> Exception:
        with pytest.raises((RuntimeError, MemoryError)) as found:
            reserve()
        return found.value

    shortages = [raised(lambda: torch.empty(2**50)), raised(lambda: np.empty(2**50)),
                 torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")]
    wrapped = RuntimeError("in a stage")
    wrapped.__cause__ = shortages[0]
    for error in (*shortages, wrapped):
        assert report(error, 0, 1, str(tmp_path)) == EXIT_INTERNAL
        said = capsys.readouterr().err
        assert "memory ran out" in said and "--micro-batch-size" in said and "Traceback" not in said
        assert "memory ran out" in json.loads((tmp_path / "exit.json").read_text())["reason"]
    assert report(RuntimeError("else"), 0, 1, None) == EXIT_INTERNAL
    assert "internal error\nRuntimeError: else" in capsys.readouterr().err


def test_each_attempt_tells_how_the_one_before_it_ended(tmp_path: Path) -> None:
    assert take_exit_record(None) is None and take_exit_record(str(tmp_path)) is None
    write_exit_record(str(tmp_path), 40, 7, "lost")
    note_attempt(str(tmp_path), 6, 2, take_exit_record(str(tmp_path)))
    note_attempt(str(tmp_path), 8, 1, take_exit_record(str(tmp_path)))  # the one before was killed
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["processes"], line["previous"]) for line in lines] == [
        (6, 2, {"code": 40, "step": 7, "reason": "lost"}), (8, 1, None)]
    (tmp_path / "exit.json").write_text('{"code": ')
    assert take_exit_record(str(tmp_path)) is None and not (tmp_path / "exit.json").exists()


def test_processes_that_end_at_once_do_not_take_the_record_from_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    whole, others = Path.replace, iter([2])

    def replace(temporary: Path, target: Path) -> Path:
        for process in others:
            with mock.patch("os.getpid", return_value=process):
                write_exit_record(str(tmp_path), 50, 3, "other")
        return whole(temporary, target)

    with mock.patch.object(Path, "replace", replace):
        write_exit_record(str(tmp_path), 40, None, "mine")
    assert capsys.readouterr().err == "" and [file.name for file in tmp_path.iterdir()] == ["exit.json"]
    assert take_exit_record(str(tmp_path)) == {"code": 40, "step": None, "reason": "mine"}


def test_a_process_without_a_gpu_says_so_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """The first processes of its machine have one, and would not know."""
    with mock.patch.object(torch.cuda, "is_available", lambda: True), \
            mock.patch.object(torch.cuda, "device_count", lambda: 4), pytest.raises(ConfigError) as caught:
        choose_device(RunConfig(), Launch(rank=5, local_rank=5, world_size=8))
    assert report(caught.value, 5, 8, None) == 20
    assert capsys.readouterr().err.startswith("rank 5: ConfigError: LOCAL_RANK = 5: this machine has 4 GPUs; start")
