"""torchrun as users start it, several launchers on one machine if need be, and what tests do to their processes."""

import contextlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Launcher = subprocess.Popen[bytes]


def torchrun(processes: int, *command: str) -> list[str]:
    """The command of one launcher on its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(command: Sequence[str], log: Path) -> Launcher:
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=log.parent, env=environment(), stdout=stream, stderr=subprocess.STDOUT)


def finish(process: Launcher) -> int:
    try:
        return process.wait(500)
    finally:
        process.kill()


def wait_until(condition: Callable[[], object], process: Launcher) -> None:
    """Wait until the condition holds or the launcher has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.05)


def wait_for_step(path: Path, step: int, process: Launcher) -> None:
    """Wait until the metrics file has the line of a step."""
    wait_until(lambda: path.exists() and any(line["step"] >= step for line in whole_lines(path)), process)


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def exit_record(checkpoints: Path) -> dict[str, Any]:
    """What the run left beside its checkpoints."""
    return json.loads((checkpoints / "exit.json").read_text())


def workers(launcher: Launcher) -> list[int]:
    """The processes that a launcher has started, by local rank."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def runs(process: int) -> bool:
    """Whether a process has not ended. One whose parent has ended may stay in the table for ever: not every container
    has a first process that takes it out."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


_ports = itertools.count(random.SystemRandom().randrange(16_000))


def free_port() -> int:
    """A port that nobody has, for a program that will listen there in some seconds.

    It is not one of those that the system gives to connections: one of them would have it by then, once in a while.
    """
    for number in _ports:
        port = 12_000 + number % 16_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("the count has no end")
