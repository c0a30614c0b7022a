"""The processes of a run that a fault may hit, each forked from a server that has imported torch."""

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from megatron_ltd.train.process.environment import Launch
from tests.gloo import PRELOADED, fork_server
from tests.hosts import Host
from tests.train.launchers import free_port, whole_lines
from tests.train.runs import RECIPES

LAUNCHER_PATIENCE_SECONDS = 30.0
"""How long torchrun waits for the others once a process has failed."""

fork_server.set_forkserver_preload(
    [*PRELOADED, "megatron_ltd.train.pretrain", "megatron_ltd.train.process.launch", __name__])


@dataclass(frozen=True)
class Handicap:
    """What is wrong with one process from the start.

    Args:
        file_bytes: the largest file that it may write; None for any.
        clock_seconds: by how much its clock jumps with its hundredth reading.
    """

    file_bytes: int | None = None
    clock_seconds: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a process ended. Negative codes are signals."""

    code: int
    said: str


def _rank(place: Launch, recipe: str, command: list[str], log: str, handicap: Handicap, host: Host | None) -> None:
    """What a process runs."""
    if host is not None:
        host.enter()
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if handicap.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (handicap.file_bytes, handicap.file_bytes))
    readings = 0

    def jumping(read: Callable[[], float] = time.time) -> float:
        nonlocal readings
        readings += 1
        return read() + (handicap.clock_seconds if readings > 100 else 0.0)

    with mock.patch("time.time", jumping):
        RECIPES[recipe].RECIPE.run(command, place)


class Ranks:
    """A run that is under way.

    Args:
        scratch: a new folder for the output.
        hosts: networks over which the processes are spread in order; none: that of this process.
    """

    def __init__(self, recipe: str, command: list[str], world_size: int, scratch: Path,
                 handicaps: dict[int, Handicap] | None = None, hosts: Sequence[Host] = ()):
        scratch.mkdir(parents=True)
        address = f"{hosts[0].address}:29500" if hosts else f"localhost:{free_port()}"
        method = f"tcp://{address}" if world_size > 1 else None
        self._logs = [scratch / f"output-{rank}" for rank in range(world_size)]
        self._processes = [fork_server.Process(target=_rank, args=(
            Launch(rank, rank, world_size, method), recipe, command, str(log),
            (handicaps or {}).get(rank, Handicap()), hosts[rank * len(hosts) // world_size] if hosts else None))
            for rank, log in enumerate(self._logs)]
        self._started = time.time()
        for process in self._processes:
            process.start()

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a process, if it is still there."""
        process = self._processes[rank]
        if process.is_alive() and process.pid is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, number)

    def wait_for_step(self, metrics: Path, step: int, seconds: float) -> None:
        """Wait until this attempt has written the line of a step, or a process has ended, or time is up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(process.is_alive() for process in self._processes):
            if (metrics.exists() and metrics.stat().st_mtime > self._started
                    and any(line["step"] >= step for line in whole_lines(metrics))):
                return
            time.sleep(0.02)

    def finish(self, seconds: float) -> list[Ended]:
        """Wait for all processes. Some time after one has failed, the others are killed, as a launcher does.

        Raises:
            TimeoutError: some were still running.
        """
        deadline = time.monotonic() + seconds
        failed_at = None
        while any(process.is_alive() for process in self._processes) and time.monotonic() < deadline:
            if failed_at is None and any(process.exitcode for process in self._processes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + LAUNCHER_PATIENCE_SECONDS:
                break
            if [process.exitcode for process in self._processes].count(0) == len(self._processes) - 1 > 0:
                for rank in range(len(self._processes)):  # stopped after the last collective, so nobody misses it
                    self.send(rank, signal.SIGCONT)
            time.sleep(0.05)
        hung = [rank for rank, process in enumerate(self._processes) if process.is_alive() and failed_at is None]
        for process in self._processes:
            process.kill()
            process.join()
        ended = [Ended(process.exitcode or 0, log.read_text(errors="replace") if log.exists() else "")
                 for process, log in zip(self._processes, self._logs, strict=True)]
        if hung:
            raise TimeoutError(f"ranks {hung} were still running after {seconds:.0f} s\n{ended[hung[0]].said[-2000:]}")
        return ended
