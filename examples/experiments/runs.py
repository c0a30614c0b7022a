"""Runs of the training program that are made once, whatever interrupts them.

A run lives in a folder of its own:

    run.json            what it is: arm, seed, peak rate, steps, command, commit, machine
    metrics.jsonl       its curve; training that continues drops what lies beyond the checkpoint it continues from
    log                 everything it said
    checkpoints/        deleted when the run is complete, except where its model is wanted
    done.json           written last, by rename: final loss, digest of the curve

A run without done.json is continued from its newest checkpoint; one with it is never started again.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import IO, Any

from benchmarks.machine import processor
from megatron_ltd.checkpoint.layout import TRACKER_NAME
from megatron_ltd.errors import DataError
from tools.commands import command_line

ROOT = Path(__file__).resolve().parents[2]
DEPENDENT = ("commit", "package", "machine")
"""What run.json says and another attempt at the same run may say otherwise."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        arguments: those of `megatron_ltd.pretrain_gpt`, without paths of outputs.
        keeps_model: whether its last checkpoint stays.
        flops: what it will cost, for the forecast.
        start: checkpoint whose weights it starts from.
    """

    folder: Path
    arm: str
    seed: int
    rate: float
    steps: int
    arguments: tuple[str, ...]
    keeps_model: bool
    flops: int
    start: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    def result(self) -> dict[str, Any] | None:
        """What done.json says; None for a run that is not complete.

        Raises:
            DataError: its curve is not the one it was completed with.
        """
        done = self.folder / "done.json"
        if not done.exists():
            return None
        found: dict[str, Any] = json.loads(done.read_text())
        if found["metrics_sha256"] != digest(self.folder / "metrics.jsonl"):
            raise DataError(f"{self.folder}/metrics.jsonl is not the curve that done.json was written for; delete "
                            f"{self.folder} to make the run again")
        return found

    def identity(self) -> dict[str, Any]:
        return {"arm": self.arm, "seed": self.seed, "rate": self.rate, "steps": self.steps,
                "arguments": list(self.arguments), "commit": commit(), "package": package(), "machine": machine()}

    def command(self) -> list[str]:
        own = self.folder / "checkpoints"
        load = ["--load", str(own)]
        if self.start is not None and not (own / TRACKER_NAME).exists():
            load = ["--load", str(self.start), "--finetune"]
        return [sys.executable, "-m", "megatron_ltd.pretrain_gpt", *self.arguments, *load, "--save", str(own),
                "--metrics-file", str(self.folder / "metrics.jsonl")]


class Stopped(Exception):
    """Someone asked the driver to stop."""


def exit_code_of(work: Callable[[], None]) -> int:
    """The exit code of a driver, which Ctrl-C or SIGTERM stops; an error that the user can repair is one message."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command_line.exit_code_of(work)
    except (KeyboardInterrupt, Stopped):
        print("stopped; start the same command again to continue", file=sys.stderr)
        return 130


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def say(line: str) -> None:
    print(line, flush=True)


def complete_all(runs: Sequence[Run], jobs: int, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The results of all runs by name; those that are missing are made, `jobs` at a time.

    Args:
        say: prints a line.

    Raises:
        DataError: a run failed. Runs in progress are ended; each can be continued.
    """
    stop = Event()
    results = {run.name: found for run in runs if (found := run.result()) is not None}
    missing = [run for run in runs if run.name not in results]
    if len(missing) < len(runs):
        say(f"{len(runs) - len(missing)} of {len(runs)} runs are complete already")
    total, spent, started = sum(run.flops for run in missing), 0, time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[dict[str, Any]], Run] = {pool.submit(complete, run, stop): run for run in missing}
        try:
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    run = futures.pop(future)
                    results[run.name] = future.result()
                    spent += run.flops
                    left = (time.monotonic() - started) * (total - spent) / spent
                    say(f"{run.name}: rate {run.rate:g}, {run.steps} steps, validation loss "
                        f"{results[run.name]['validation_loss']:.4f}; {len(futures)} runs left, {left / 60:.0f} min")
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return results


def complete(run: Run, stop: Event) -> dict[str, Any]:
    """Start the run, or go on with it, and note its result.

    Raises:
        DataError: it failed, or its folder belongs to another run.
        Stopped: `stop` was set.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "lock", "w") as lock:
        _hold(lock, stop)
        if (found := run.result()) is not None:  # by a process that an earlier driver left behind
            return found
        _claim(run)
        with open(run.folder / "log", "ab") as log:
            # The lock is inherited: a run that outlives its driver still keeps others off its folder.
            process = subprocess.Popen(run.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                       cwd=ROOT, env=_environment(), pass_fds=(lock.fileno(),), start_new_session=True)
            code = _wait(process, stop)
        if code != 0:
            raise DataError(f"{run.folder}: the run ended with exit code {code}; its log says why: {run.folder}/log. "
                            "Start the experiment again to continue it from its newest checkpoint")
        return _finish(run)


def _hold(lock: IO[str], stop: Event) -> None:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if stop.wait(1.0):
                raise Stopped from None


def _wait(process: subprocess.Popen[bytes], stop: Event) -> int:
    while process.poll() is None:
        if stop.wait(0.2):
            process.terminate()
            process.wait()
            raise Stopped
    return process.returncode


def _claim(run: Run) -> None:
    path, identity = run.folder / "run.json", run.identity()
    if path.exists():
        known = json.loads(path.read_text())
        differing = [key for key in identity if key not in DEPENDENT and known.get(key) != identity[key]]
        if differing:
            raise DataError(f"{path}: {differing[0]} = {known.get(differing[0])!r}, but this run has "
                            f"{identity[differing[0]]!r}; delete the folder, or choose another --output-dir")
    else:
        write_json(path, identity)


def _finish(run: Run) -> dict[str, Any]:
    metrics = run.folder / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [record["validation_loss"] for record in records
              if "validation_loss" in record and record["step"] == run.steps]
    if len(losses) != 1 or not math.isfinite(losses[0]):
        raise DataError(f"{metrics}: {len(losses)} validation losses at step {run.steps}, of {losses}; a complete run "
                        "has one that is finite")
    found = {"validation_loss": losses[0], "metrics_sha256": digest(metrics), "finished": int(time.time())}
    if not run.keeps_model:
        shutil.rmtree(run.folder / "checkpoints")
    write_json(run.folder / "done.json", found)
    return found


def write_json(path: Path, content: Any) -> None:
    """Write by rename: the file is there in full or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit() -> str:
    """The commit of the code, with a mark if files differ from it."""
    return _git("describe", "--always", "--dirty", "--exclude", "*")


def package() -> str:
    """Git's hash of the package's files: the same in every commit that does not change them."""
    return _git("rev-parse", "--short", "HEAD:megatron_ltd")


def machine() -> str:
    """Processor and version of PyTorch, on which the last bits of a loss depend."""
    return f"{processor('cpu')}, torch {version('torch')}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=False).stdout.strip() or "unknown"


def _environment() -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
