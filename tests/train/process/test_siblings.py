"""Processes that are still there after the grace period are killed, and no others."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

from megatron_ltd.train.process import siblings

Sleeper = subprocess.Popen[bytes]


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """A process that ignores SIGTERM."""
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def identity_of(process: Sleeper) -> siblings.Sibling:
    started = siblings.started_at(process.pid)
    assert started is not None
    return process.pid, started


def test_a_process_that_hangs_is_killed(sleeper: Sleeper) -> None:
    process, started = identity_of(sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    siblings.end_soon([(process, started)])
    assert sleeper.wait(120) == -signal.SIGKILL
    assert siblings.started_at(process) is None


def test_another_process_with_the_number_of_one_that_has_ended_is_left_alone(sleeper: Sleeper) -> None:
    process, started = identity_of(sleeper)
    with mock.patch.object(siblings, "GRACE_SECONDS", 0.3):
        siblings.main([f"{process}:{started - 1}"])
        assert sleeper.poll() is None
        siblings.main([f"{process}:{started}"])
    assert sleeper.wait(120) == -signal.SIGKILL


def test_only_other_processes_of_this_host_can_be_reached() -> None:
    place, process, started = siblings.identity()
    others = [(place, process, started), (place, process + 1, 5), ("another host", process + 2, 6)]
    assert siblings.on_this_host(others) == [(process + 1, 5)]
    assert process == os.getpid() and started == siblings.started_at(process)
    assert siblings.on_this_host([("", process + 1, 5)]) == []
