"""A run that is asked to stop: it saves, says with its exit code why it stopped, and goes on as if it had not."""

import atexit
import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_ltd import pretrain_gpt
from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.train.process import stopping
from megatron_ltd.train.process.environment import Launch
from tests.gloo import RankFailure, launch_ranks
from tests.train.moments import pretrain_with_signal
from tests.train.runs import TINY, Corpus, Ending, Run, curve, pretrain, read_lines, run, words

STEPS = 8
PP2_SHORT = {**TINY, "train_iters": STEPS, "random_ltd_steps": 6, "eval_interval": 3,
             "pipeline_model_parallel_size": 2, "hidden_dropout": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return curve(run(tmp_path_factory.mktemp("truth"), {**PP2_SHORT, **corpus.settings}, 2).lines)


def settings_in(corpus: Corpus, folder: Path, **settings: Any) -> dict[str, Any]:
    checkpoints = str(folder / "checkpoints")
    return {**PP2_SHORT, **corpus.settings, "save": checkpoints, "load": checkpoints,
            "metrics_file": str(folder / "metrics.jsonl"), **settings}


def record(folder: Path) -> dict[str, Any]:
    """What is left for the scheduler beside the checkpoints."""
    return json.loads((folder / "checkpoints" / "exit.json").read_text())


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in (folder / "checkpoints").glob("iter_*"))


def ask_to_stop(corpus: Corpus, folder: Path, victim: int, kind: str, at: int, number: int = signal.SIGTERM,
                **settings: Any) -> set[int]:
    """Two ranks of which one is sent a signal; the exit codes."""
    answers = launch_ranks(pretrain_with_signal, 2, settings_in(corpus, folder, **settings), folder, victim,
                           int(number), kind, at, timeout=120)
    return {ending.code for ending, _ in answers}


def assert_goes_on(corpus: Corpus, folder: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """The same command, given again, finishes the run with the curve of the uninterrupted one."""
    assert curve(run(folder, settings_in(corpus, folder), 2).lines) == uninterrupted
    assert record(folder) == {"code": 0, "step": STEPS, "reason": "complete"}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("background", [False, True], ids=["", "async"])
def test_sigterm_to_one_rank_lets_all_save_after_the_same_step(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]], victim: int, background: bool,
) -> None:
    assert ask_to_stop(corpus, tmp_path, victim, "step", 4, async_save=background, save_interval=2) == {10}
    assert record(tmp_path) == {"code": 10, "step": 4, "reason": "stopped by a signal"}
    assert steps_saved(tmp_path) == [2, 4]
    assert_goes_on(corpus, tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_like_sigterm(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]], number: signal.Signals,
) -> None:
    assert ask_to_stop(corpus, tmp_path, 1, "step", 4, number) == {10}
    assert record(tmp_path) == {"code": 10, "step": 4, "reason": "stopped by a signal"}
    assert steps_saved(tmp_path) == [4]
    assert_goes_on(corpus, tmp_path, uninterrupted)


def watch(numbers: list[int], patience: float) -> bool:
    """Whether a process that is sent these signals, one right after the other, lives on and has noted a request."""
    with mock.patch.object(stopping, "ONE_REQUEST_SECONDS", patience):
        with stopping.StopWatcher(TrainingConfig()) as watcher:
            for number in numbers:
                os.kill(os.getpid(), number)
    return watcher.signalled


def watch_in_rank(rank: int, world_size: int, init_method: str, numbers: list[int], patience: float) -> bool:
    return watch(numbers, patience)


def signalled_at_exit(rank: int, world_size: int, init_method: str, settings: dict[str, Any], number: int) -> None:
    atexit.register(os.kill, os.getpid(), number)
    pretrain_gpt.RECIPE.run(words(settings), Launch(rank, rank, world_size, init_method))


@pytest.mark.parametrize("number", stopping.STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_that_comes_when_the_run_has_ended_does_not_change_its_exit_code(
    corpus: Corpus, tmp_path: Path, number: signal.Signals,
) -> None:
    settings = settings_in(corpus, tmp_path, train_iters=2, exit_interval=1, pipeline_model_parallel_size=1)
    with pytest.raises(RankFailure, match="died with exit code 11 before"):
        launch_ranks(signalled_at_exit, 1, settings, int(number))
    assert record(tmp_path)["code"] == 11


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["from-the-terminal", "through-torchrun"])
def test_a_second_ctrl_c_ends_the_process_at_once(second: signal.Signals) -> None:
    with pytest.raises(RankFailure, match=f"died with exit code -{int(second)}"):
        launch_ranks(watch_in_rank, 1, [int(signal.SIGINT), int(second)], -1.0)


@pytest.mark.parametrize(("numbers", "patience"), [
    ([signal.SIGINT, signal.SIGINT, signal.SIGTERM], 60.0),  # one Ctrl-C in several ways
    ([signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP], -1.0),
    ([signal.SIGTERM, signal.SIGINT], -1.0),
], ids=["one-ctrl-c", "impatient-scheduler", "one-ctrl-c-after-sigterm"])
def test_other_repeated_signals_are_one_request(numbers: list[signal.Signals], patience: float) -> None:
    assert watch([int(number) for number in numbers], patience)


def test_signals_that_nohup_ignores_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not watch([int(signal.SIGHUP)], 1.0)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_in_the_middle_of_a_step_is_obeyed_after_that_step_or_the_next(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]],
) -> None:
    passes = 5 * 4  # four microbatches a step
    assert ask_to_stop(corpus, tmp_path, 1, "layers", passes + 2, eval_interval=100) == {10}
    assert record(tmp_path)["step"] in (6, 7)
    assert steps_saved(tmp_path) == [record(tmp_path)["step"]]


def test_sigterm_before_the_first_step_is_obeyed_after_it(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]],
) -> None:
    assert ask_to_stop(corpus, tmp_path, 1, "files", 1) == {10}
    assert record(tmp_path)["step"] == 1 and steps_saved(tmp_path) == [1]
    assert_goes_on(corpus, tmp_path, uninterrupted)


@pytest.mark.parametrize("operation", [1, 3, 6])
def test_a_second_sigterm_while_the_run_saves_does_not_cost_the_checkpoint(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]], operation: int,
) -> None:
    arguments = (settings_in(corpus, tmp_path, exit_interval=3), tmp_path / "checkpoints" / ".tmp-iter_0000003", 0,
                 int(signal.SIGTERM), "files", operation)
    answers = launch_ranks(pretrain_with_signal, 2, *arguments, timeout=120)
    assert {ending.code for ending, _ in answers} <= {10, 11}
    assert steps_saved(tmp_path) == [3]
    assert_goes_on(corpus, tmp_path, uninterrupted)


def test_sigterm_during_the_last_step_does_not_keep_a_run_from_being_complete(corpus: Corpus, tmp_path: Path) -> None:
    assert ask_to_stop(corpus, tmp_path, 0, "step", STEPS) == {0}
    assert record(tmp_path) == {"code": 0, "step": STEPS, "reason": "complete"}


def test_without_the_handler_sigterm_ends_the_process_at_once(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="--- rank 1 ---\ndied with exit code -15"):
        ask_to_stop(corpus, tmp_path, 1, "step", 4, exit_signal_handler=None, no_exit_signal_handler=True)
    assert steps_saved(tmp_path) == []


def test_an_exit_interval_saves_and_stops_at_its_multiples(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]],
) -> None:
    for step in (3, 6):
        run(tmp_path, settings_in(corpus, tmp_path, exit_interval=3), 2, code=11)
        assert record(tmp_path) == {"code": 11, "step": step, "reason": "interval or duration reached"}
    assert steps_saved(tmp_path) == [3, 6]
    assert_goes_on(corpus, tmp_path, uninterrupted)


def test_a_run_stops_when_the_time_of_one_rank_is_over(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]],
) -> None:
    settings = settings_in(corpus, tmp_path, exit_duration_in_mins=600.0)
    endings = launch_ranks(with_a_fast_clock, 2, settings, timeout=120)
    assert {ending.code for ending in endings} == {11}
    assert record(tmp_path) == {"code": 11, "step": 3, "reason": "interval or duration reached"}
    assert_goes_on(corpus, tmp_path, uninterrupted)


def with_a_fast_clock(rank: int, world_size: int, init_method: str, settings: dict[str, Any]) -> Ending:
    """`pretrain` on a rank, of which the last one lives through eleven hours in its third step."""
    readings = 0

    def monotonic() -> float:
        nonlocal readings
        readings += 1
        # The first reading is that of the beginning, then one a step.
        return time.monotonic() + (40_000.0 if rank == world_size - 1 and readings > 3 else 0.0)

    with mock.patch.object(stopping, "time", mock.Mock(monotonic=monotonic)):
        return pretrain(rank, world_size, init_method, settings)


def test_a_duration_that_is_over_at_once_still_trains_a_step(corpus: Corpus, tmp_path: Path) -> None:
    stopped: Run = run(tmp_path, settings_in(corpus, tmp_path, exit_duration_in_mins=1e-9), 2, code=11)
    assert [line["step"] for line in stopped.steps] == [1] and steps_saved(tmp_path) == [1]


def test_the_handlers_of_the_calling_program_are_put_back(corpus: Corpus, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in stopping.STOP_SIGNALS]
    settings = settings_in(corpus, tmp_path, pipeline_model_parallel_size=1, exit_interval=2)
    assert pretrain(0, 1, "", settings).code == 11
    assert [signal.getsignal(number) for number in stopping.STOP_SIGNALS] == before
    assert len([line for line in read_lines(tmp_path / "metrics.jsonl") if "lm_loss" in line]) == 2
