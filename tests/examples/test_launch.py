"""What a user reads last when a run started by `examples/*.sh` ends, and its exit code."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from examples.ending import CRASHED, Ending, conclude, record_crash
from tests.train.launchers import ROOT, torchrun, wait_until

TINY = ("--mock-data --vocab-size 512 --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 "
        "--micro-batch-size 2 --global-batch-size 4 --train-iters 20 --lr 1e-3 --eval-iters 0 "
        "--log-interval 10").split()


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME"}}
    return {**inherited, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "GPUS_PER_NODE": "1", **more}


def run(*words: str, script: str = "pretrain_gpt", **more: str) -> tuple[int, list[str]]:
    """Exit code and lines of the terminal, in the order in which they appear there."""
    done = subprocess.run(["bash", str(ROOT / "examples" / f"{script}.sh"), *TINY, *words], env=environment(**more),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False)
    return done.returncode, done.stdout.splitlines()


def test_a_shipped_configuration_made_small_says_what_was_done_until_it_is_complete(tmp_path: Path) -> None:
    """Its budget, warm-up and decay, in tokens, give way to --train-iters, and its dropping to the sizes."""
    save = tmp_path / "run"
    words = ["--tokenizer-type", "NullTokenizer", "--save", str(save), "--load", str(save)]
    shipped = {"CONFIG": str(ROOT / "examples/configs/gpt_125m.toml")}
    code, said = run(*words, "--exit-interval", "10", **shipped)
    assert code == 11
    assert re.fullmatch(rf"saved {save}/iter_0000010: step 10, [0-9.]+ [KM]iB, [0-9.]+ s", said[-5]), said[-6:]
    assert said[-3:] == ["stopped as planned after step 10 of 20: --exit-interval = 10 (exit code 11)",
                         f"newest checkpoint: {save}/iter_0000010", "to continue: the same command again"]
    assert not any("Traceback" in line or "FAILED" in line for line in said)
    assert json.loads((save / "exit.json").read_text())["step"] == 10
    code, said = run(*words, **shipped)
    assert (code, said[-2:]) == (0, ["complete: step 20 of 20", f"newest checkpoint: {save}/iter_0000020"])
    code, said = run(*words, **shipped)
    assert code == 0
    assert said[-1].startswith(f"already complete: {save} holds step 20 of 20; no step was trained.")


def test_problems_of_all_kinds_are_told_in_one_round(tmp_path: Path) -> None:
    code, said = run("--num-experts", "8", "--lr", "abc", "--hidden-size", "65", "--eval-iters", "1000000000",
                     "--no-such-flag", "--train-samples", "7", "--train-epochs", "1", "--load", "nowhere",
                     "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "no.json", "--merge-file", "no.txt",
                     "--deepspeed-config", "no.json", "--save", str(tmp_path / "new"))
    assert code == 20
    assert said[0] == f"ConfigError: {len(said) - 1} problems in the settings:"
    for problem in ("--num-experts 8: not supported", "--lr = abc: 'abc' is not a number",
                    "--hidden-size = 65: not divisible", "--eval-iters = 1000000000: must be", "--no-such-flag: no",
                    "--train-iters = 20 and --train-samples = 7 and --train-epochs = 1 are given",
                    "--load = nowhere is not a folder", "--vocab-file: no file no.json", "--merge-file: no file no.txt",
                    "--deepspeed-config = no.json: cannot be read"):
        assert sum(line.startswith(f"  - {problem}") for line in said) == 1, (problem, said)


def test_a_signal_to_the_script_saves_and_gives_its_code_without_any_folder(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        script = subprocess.Popen(["bash", str(ROOT / "examples/pretrain_gpt.sh"), *TINY, "--train-iters", "100000"],
                                  env=environment(), stdout=stream, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: "iteration  " in log.read_text(), script)
            script.send_signal(signal.SIGTERM)
            assert script.wait(240) == 10
        finally:
            script.kill()
    *said, stopped, unsaved = log.read_text().splitlines()
    assert stopped.startswith("stopped by a signal after step ") and unsaved.startswith("nothing was saved")
    assert not any("Traceback" in line or "SignalException" in line for line in said)


@pytest.mark.parametrize("where", ["--save", "file", "nowhere"])
def test_a_refused_setting_gives_20_on_the_first_start_wherever_save_is(tmp_path: Path, where: str) -> None:
    words, more = ["--hidden-size", "65"], {}
    if where == "--save":
        words += ["--save", str(tmp_path / "new")]
    if where == "file":
        (tmp_path / "run.toml").write_text(f'save = "{tmp_path}/new"\n')
        more = {"CONFIG": str(tmp_path / "run.toml")}
    code, lines = run(*words, **more)
    assert code == 20
    assert len(lines) == 1 and lines[0].startswith("ConfigError: --hidden-size = 65: not divisible"), lines
    assert not (tmp_path / "new").exists()


def test_under_torchrun_itself_the_reason_is_the_root_cause() -> None:
    command = torchrun(2, "-m", "megatron_ltd.pretrain_gpt", *TINY, "--hidden-size", "65")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    cause = done.stderr[done.stderr.index("Root Cause"):]
    assert "exitcode  : 20" in cause and "traceback : ConfigError: --hidden-size = 65: not divisible" in cause


LOST, REFUSED, STOPPED = 40, 21, 11


@pytest.mark.parametrize(("endings", "processes", "code", "printed"), [
    ([(STOPPED, "stopped", True), (STOPPED, "stopped", False)], 2, STOPPED, ""),
    ([(REFUSED, "no corpus", False)], 1, REFUSED, "no corpus\n"),  # the first rank is on another node
    ([(LOST, "another failed", True), (REFUSED, "rank 1: disk", True)], 2, REFUSED, "rank 1: disk\n"),
    ([(LOST, "another failed", True)], 2, LOST, "CRASH\n"),  # the other process was killed
    ([(LOST, "another failed", True), (70, "internal error", True)], 2, 70, "CRASH\n"),
    ([(0, "complete", True), (0, "complete", False)], 2, 0, ""),
    ([], 2, 1, "CRASH\n"),
])
def test_the_cause_is_the_last_word_and_a_crash_keeps_its_report(
    capfd: pytest.CaptureFixture[str], endings: list[tuple[int, str, bool]], processes: int, code: int, printed: str,
) -> None:
    assert conclude([Ending(*ending) for ending in endings], "CRASH", processes) == code
    assert capfd.readouterr().err == printed


def test_processes_that_were_aborted_leave_a_record_by_their_launcher(tmp_path: Path) -> None:
    """As NCCL's watchdog ends them, with SIGABRT: nothing of theirs runs any more."""
    aborted = ChildFailedError("megatron_ltd.pretrain_gpt", {0: ProcessFailure(0, 4711, -signal.SIGABRT, "none")})
    record_crash(str(tmp_path), CRASHED, str(aborted))
    told = {"code": 1, "step": None, "reason": "a process ended with -6 and said nothing"}
    assert json.loads((tmp_path / "exit.json").read_text()) == told
    record_crash(str(tmp_path), 70, "another one")
    assert json.loads((tmp_path / "exit.json").read_text()) == told, "what was written during the run stays"
