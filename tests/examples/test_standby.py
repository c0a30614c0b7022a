"""Processes that stand by for torch's launcher."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from examples.standby import Standby
from tests.train.launchers import ROOT, environment, runs

TELLS = """
import json, os, sys
told = {"pid": os.getpid(), "arguments": sys.argv[1:], "has torch": "torch" in sys.modules,
        "given": os.environ.get("GIVEN"), "kept": os.environ.get("KEPT"), "input": sys.stdin.read()}
with open(sys.argv[1], "w") as file:
    json.dump(told, file)
sys.exit(7)
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tells.py").write_text(TELLS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("KEPT", "from the launcher")


def started(folder: Path, number: int) -> SubprocessHandler:
    """As torch's launcher starts a process."""
    return SubprocessHandler(sys.executable, ("-u", "-m", "tells", str(folder / str(number)), "b c"),
                             {"GIVEN": f"to {number}"}, None, None, number, None)


def told(folder: Path, number: int, handler: SubprocessHandler) -> dict[str, Any]:
    assert handler.proc.wait(120) == 7
    return json.loads((folder / str(number)).read_text())


def test_the_launcher_takes_what_stands_by_and_else_starts_processes_itself(tmp_path: Path) -> None:
    with Standby("tells", 2, later=3600.0) as standby:
        lost, taken = standby._waiting
        lost.kill()
        lost.wait()
        handlers = [started(tmp_path, number) for number in range(2)]
        for number, handler in enumerate(handlers):
            is_taken = handler.proc is taken
            assert told(tmp_path, number, handler) == {
                "pid": handler.proc.pid, "arguments": [str(tmp_path / str(number)), "b c"], "has torch": is_taken,
                "given": f"to {number}", "kept": "from the launcher", "input": ""}
        assert handlers[0].proc is taken and handlers[1].proc is not lost
        standby.prepare()
        waiting = list(standby._waiting)
        assert len(waiting) == 2
    assert [process.poll() for process in waiting] == [-9, -9]
    assert "take_or_start" not in SubprocessHandler._popen.__qualname__


def test_what_stands_by_ends_with_its_launcher(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", "from examples.standby import Standby; import time\n"
         "with Standby('tells', 1) as standby: print(standby._waiting[0].pid, flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE, text=True, env={**environment(), "PYTHONPATH": str(ROOT)})
    assert launcher.stdout is not None
    waiting = int(launcher.stdout.readline())
    os.kill(waiting, 0)
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    deadline = time.monotonic() + 120
    while runs(waiting):
        assert time.monotonic() < deadline
        time.sleep(0.05)
