"""How far a run is, from its metrics file and the folder of its checkpoints."""

import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.log import duration_text
from megatron_ltd.train.process.exits import ATTEMPTS_NAME, RECORD_NAME
from tools.pages.metrics_file import is_number, read_metrics

RECENT_STEPS = 100
SLOW = 1.5
"""A step that takes so many times the median of the recent ones is slow."""
SILENT_SECONDS = 60.0
SHOWN_RESTARTS = 3
HOSTS: dict[str, tuple[str, Callable[[float], bool], Callable[[float], str]]] = {
    "host_memory_free": ("least memory free", lambda share: share < 0.1, lambda share: f"{share:.1%} of a host's"),
    "clock_skew_seconds": ("clocks differ", lambda seconds: seconds > 1.0, lambda seconds: f"by {seconds:.1f} s"),
}
"""What is shown of the hosts, and when."""


@dataclass(frozen=True)
class Progress:
    """A run as its files tell it.

    Args:
        steps: the records of training steps.
        held_out: those of validation.
        total: steps of the whole run; None if not known.
        ending: what `exit.json` says, if it was written after the last record.
        saves: the steps of its checkpoints.
        restarts: the steps from which it went on after it had ended, and how it had.
        silent_seconds: since the last record was written.
    """

    label: str
    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    total: int | None
    ending: dict[str, Any] | None
    saves: list[int]
    restarts: list[tuple[int, str]]
    silent_seconds: float

    @property
    def ended(self) -> bool:
        return self.ending is not None

    @property
    def typical_seconds(self) -> float:
        """Of a recent step."""
        return statistics.median(line["step_seconds"] for line in self.steps[-RECENT_STEPS:])

    @property
    def slow_steps(self) -> list[int]:
        """Recent steps that took much longer than the others."""
        return [line["step"] for line in self.steps[-RECENT_STEPS:]
                if line["step_seconds"] > SLOW * self.typical_seconds]

    @property
    def stragglers(self) -> Counter[str]:
        """Processes that the recent lines name as stragglers, and how many lines do."""
        return Counter(name for line in self.steps[-RECENT_STEPS:] for name in line.get("stragglers") or ())

    @property
    def state(self) -> str:
        """In words."""
        if self.ending is not None:
            return f"ended with code {self.ending['code']}: {self.ending['reason']}"
        if self.steps and self.steps[-1]["step"] == self.total:
            return "at its last step"
        quiet = max(SILENT_SECONDS, 10 * self.typical_seconds) if self.steps else SILENT_SECONDS
        if self.silent_seconds > quiet:
            return f"no new step for {duration_text(self.silent_seconds)}"
        return "running"

    def facts(self) -> list[tuple[str, str]]:
        """What matters now, as (name, value)."""
        if not self.steps:
            return [("state", self.state)]
        last = self.steps[-1]
        of = f" of {self.total}" if self.total is not None else ""
        found = [("state", self.state), ("step", f"{last['step']}{of}"), ("loss", f"{last['lm_loss']:.4f}")]
        if self.held_out:
            found.append(("validation loss", f"{self.held_out[-1]['validation_loss']:.4f} at step "
                                             f"{self.held_out[-1]['step']}"))
        found += [("kept length", str(last["kept_length"])), ("FLOPs saved so far", f"{last['cumulative_saving']:.1%}"),
                  ("tokens a second", f"{last['tokens_per_second']:,.0f}"),
                  ("seconds a step", f"{self.typical_seconds:.3g}"),
                  ("skipped updates", str(sum(bool(line.get("skipped")) for line in self.steps)))]
        if self.slow_steps:
            found.append(("slow steps", ", ".join(map(str, self.slow_steps[-5:]))))
        if self.stragglers:
            found.append(("stragglers", "; ".join(f"{name} in {count} of the recent lines"
                                                  for name, count in self.stragglers.items())))
        found += [(name, text(last[field])) for field, (name, limit, text) in HOSTS.items()
                  if is_number(last.get(field)) and limit(last[field])]
        if self.saves:
            found.append(("checkpoints", f"{len(self.saves)}, the newest of step {self.saves[-1]}"))
        if self.restarts:
            causes = "; ".join(f"from step {step}: {cause}" for step, cause in self.restarts[-SHOWN_RESTARTS:])
            earlier = ", the last ones " if len(self.restarts) > SHOWN_RESTARTS else ", "
            found.append(("restarts", f"{len(self.restarts)}{earlier}{causes}"))
        if self.total is not None and not self.ended:
            found.append(("time left", duration_text((self.total - last["step"]) * self.typical_seconds)))
        return found


def read_progress(label: str, metrics: Path, checkpoints: Path | None, total: int | None) -> Progress:
    """The run so far.

    Args:
        checkpoints: its --save folder.

    Raises:
        DataError: the metrics file cannot be read.
    """
    numbers = ("step", "lm_loss", "kept_length", "step_seconds", "tokens_per_second", "cumulative_saving")
    records, _ = read_metrics(metrics, numbers)
    written = metrics.stat().st_mtime
    steps = {line["step"]: line for line in records if "lm_loss" in line}
    held_out = {line["step"]: line for line in records if is_number(line.get("validation_loss"))}
    ending, saves, restarts = None, [], []
    if checkpoints is not None:
        saves = sorted(int(path.name.removeprefix("iter_")) for path in checkpoints.glob("iter_*")
                       if path.name.removeprefix("iter_").isdigit())
        ending = _ending(checkpoints / RECORD_NAME, written)
        restarts = _restarts(checkpoints / ATTEMPTS_NAME)
    return Progress(label, list(steps.values()), list(held_out.values()), total, ending, saves, restarts,
                    time.time() - written)


def _ending(path: Path, not_before: float) -> dict[str, Any] | None:
    """The record of the run's end; None while it is under way, or if the record is of an earlier attempt."""
    try:
        if path.stat().st_mtime < not_before - 1:
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Leave --checkpoints out.") from error
    return found


def _restarts(path: Path) -> list[tuple[int, str]]:
    """Those since the run began from scratch; a line that was cut short is passed over."""
    found: list[tuple[int, str]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Leave --checkpoints out.") from error
    for number, line in enumerate(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            attempt = json.loads(line)
            previous, step = attempt["previous"], int(attempt["step"])
            how = "ended without a word" if previous is None else f"code {previous['code']}, {previous['reason']}"
            found = [*found, (step, how)] if number and (step or previous) else []
    return found
