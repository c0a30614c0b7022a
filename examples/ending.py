"""How a run ended, from what its processes told torch's launcher: its exit code, its message and its record."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ltd.errors import EXIT_COMPLETE, EXIT_INTERNAL, EXIT_PEER_LOST
from megatron_ltd.log import Console
from megatron_ltd.train.process.exits import RECORD_NAME, write_exit_record

CRASHED = 1


@dataclass(frozen=True)
class Ending:
    """How one process ended, as it told its launcher."""

    code: int
    reason: str
    printed: bool

    @classmethod
    def read(cls, path: Path) -> "Ending":
        told = json.loads(path.read_text(encoding="utf-8"))["message"]
        return cls(told["errorCode"], told["message"], told["printed"])


def endings_in(folder: Path) -> list[Ending]:
    """How the processes of the last attempt ended, of those that told.

    Args:
        folder: with the logs of torch's launcher.
    """
    told = sorted(folder.rglob("error.json"), key=lambda path: (_attempt(path), path))
    return [Ending.read(path) for path in told if _attempt(path) == _attempt(told[-1])]


def _attempt(path: Path) -> int:
    return int(path.parent.parent.name.removeprefix("attempt_"))


def conclude(endings: list[Ending], crash: str, processes: int) -> int:
    """Print what the processes have not said, and return the exit code.

    Args:
        crash: torch's report; empty if every process ended with 0.
    """
    # Processes that lost another one know nothing of the cause.
    causes = [ending for ending in endings if ending.code not in (EXIT_COMPLETE, EXIT_PEER_LOST)]
    explained = [ending for ending in causes if ending.code != EXIT_INTERNAL]
    if explained and len(causes) == len(explained):
        told = {ending.reason for ending in endings}
        cause = next((ending for ending in explained if ending.printed), explained[0])
        if not cause.printed or len(told) > 1:
            Console().error(cause.reason)
        return cause.code
    if not crash or (len(endings) == processes and all(ending.code == EXIT_COMPLETE for ending in endings)):
        return EXIT_COMPLETE
    Console().error(crash)
    return next((ending.code for ending in [*causes, *endings] if ending.code != EXIT_COMPLETE), CRASHED)


def record_crash(save: str, code: int, crash: str) -> None:
    """Write `exit.json` for processes that could not: those killed, or aborted as by NCCL's watchdog."""
    if not (Path(save) / RECORD_NAME).exists():
        died = re.search(r"exitcode\s*: (-?\d+)", crash)
        reason = f"a process ended with {died[1]} and said nothing" if died else crash.partition("\n")[0]
        write_exit_record(save, code, None, reason)


def completed_since(save: str, started: float) -> bool:
    """Whether the run was completed, by others, while this launcher was running.

    Args:
        started: when it was, in seconds since the epoch.
    """
    record = Path(save) / RECORD_NAME
    try:
        return record.stat().st_mtime >= started and json.loads(record.read_text())["code"] == EXIT_COMPLETE
    except (OSError, ValueError):  # not there, or just being written
        return False
