"""The other processes of this run on this host, and how hung ones are killed.

The other processes notice a hung process when a collective times out. They exit, but the launcher cannot restart the
run before the last process is gone, and torchrun waits 30 seconds for one that ignores SIGTERM because it is stopped,
stuck in a system call, or in an endless loop. So a process that exits because of a lost peer starts a small program
that outlives it: after a grace period in which the others can report and exit by themselves, it kills those that
remain. A process is identified by its process id and start time, which the processes exchange at start-up.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

GRACE_SECONDS = 3.0

Sibling = tuple[int, int]
"""Process id and start time, in clock ticks since the host's boot."""


def identity() -> tuple[str, int, int]:
    """This process's pid namespace (empty if unknown), process id and start time."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        place = ""
    return place, os.getpid(), started_at(os.getpid()) or 0


def on_this_host(identities: Iterable[tuple[str, int, int]]) -> list[Sibling]:
    """The processes other than this one that can be signalled from here.

    Args:
        identities: those of all processes of the run.
    """
    here, own, _ = identity()
    return [(process, started) for place, process, started in identities if place == here != "" and process != own]


def started_at(process: int) -> int | None:
    """When a process was started; None if it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the process name in front may contain any character
    return None if state in "ZX" else int(fields[18])


def end_soon(processes: list[Sibling]) -> None:
    """Kill these after the grace period, even if this process has exited by then."""
    if any(started_at(process) == started for process, started in processes):
        words = [f"{process}:{started}" for process, started in processes]
        subprocess.Popen([sys.executable, "-I", "-S", __file__, *words], start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main(words: list[str]) -> None:
    """Kill the processes `PID:START` after the grace period."""
    processes = [(int(process), int(started)) for process, started in (word.split(":") for word in words)]
    deadline = time.monotonic() + GRACE_SECONDS
    while processes and time.monotonic() < deadline:
        time.sleep(0.1)
        processes = [(process, started) for process, started in processes if started_at(process) == started]
    for process, _ in processes:
        with contextlib.suppress(ProcessLookupError):  # it has just exited
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
