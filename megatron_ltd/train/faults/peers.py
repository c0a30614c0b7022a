"""Processes and hosts that fall out of line: stragglers, little memory left, clocks that differ.

All processes take the same time for a step, since they wait for each other. So each one measures what it does by
itself: the forward passes of its stages, and the reading of samples. The numbers travel with the counts of a step that
is logged, once an interval, so nothing waits for them.
"""

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_ltd.log import Console
from megatron_ltd.train.faults.spikes import deviation

SLOW = 1.5
"""A process is a straggler if its time is so many times the median of the others', and outside their range."""
SPREADS = 5.0
"""Half the width of that range, in robust standard deviations."""
LEAST_DELAY_SECONDS = 0.05
"""Half its least width; below it times vary by chance."""
LEAST_MEMORY = 0.05
"""Share of a host's memory below which it is reported."""
MOST_SKEW_SECONDS = 1.0


class OwnTime:
    """Seconds that this process computes by itself.

    Args:
        stages: their forward passes in training are timed, on a GPU by events that are read once they have happened.
    """

    def __init__(self, stages: Iterable[nn.Module], on_gpu: bool):
        self._on_gpu, self._seconds, self._steps, self._is_warm = on_gpu, 0.0, 0, False
        self._began: Any = None
        self._spans: list[tuple[Any, Any]] = []
        for stage in stages:
            stage.register_forward_pre_hook(self._begin)
            stage.register_forward_hook(self._end)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, stage: nn.Module, *_: Any) -> None:
        self._began = self._now() if stage.training else None

    def _end(self, *_: Any) -> None:
        if self._began is not None:
            self._spans.append((self._began, self._now()))

    def step(self, seconds: float) -> None:
        """Count a step whose samples took so long to read; not the first one, which also compiles and allocates."""
        if self._is_warm:
            self._seconds += seconds
            self._steps += 1
            self._add_up()
        else:
            self._is_warm = True
            self._spans.clear()

    def take(self) -> float:
        """Seconds a step since the last call; 0 before the first one that counts."""
        self._add_up()
        steps, seconds = self._steps, self._seconds
        self._seconds, self._steps = 0.0, 0
        return seconds / steps if steps else 0.0

    def _add_up(self) -> None:
        """Count the passes that have ended, so that they do not pile up where the log is rare."""
        left = [span for span in self._spans if self._on_gpu and not span[1].query()]
        self._seconds += sum(begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
                             for begin, end in self._spans[:len(self._spans) - len(left)])
        self._spans = left


def free_memory() -> float:
    """Share of this host's memory that is available; 1 where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1.0
    sizes = {name: float(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return sizes["MemAvailable"] / sizes["MemTotal"] if "MemAvailable" in sizes else 1.0


class Peers:
    """Compares what all processes tell.

    Args:
        hosts: of each process.
        stages: for each process a number, equal for those with the same part of the model, which are compared.
    """

    def __init__(self, hosts: Sequence[str], stages: Sequence[int], console: Console):
        self.hosts, self.stages, self.console = hosts, stages, console
        self._slow: dict[int, str] = {}
        self._said: set[str] = set()

    def hear(self, told: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Warn of what is new, and return the fields of the metrics file.

        Args:
            told: of each process its own seconds a step, the share of memory that is free, and its clock at one moment;
                0 for what is not known yet.
        """
        own, memory, clocks = zip(*told, strict=True)
        fields: dict[str, Any] = {"host_memory_free": min(memory)}
        for rank, share in enumerate(memory):
            if share < LEAST_MEMORY:
                self._warn_once(f"memory of {self.hosts[rank]}", f"{share:.1%} left")
        if len(told) > 1 and all(clocks):
            middle = statistics.median(clocks)
            skews = [clock - middle for clock in clocks]
            fields["clock_skew_seconds"] = max(map(abs, skews))
            for rank, skew in enumerate(skews):
                if abs(skew) > MOST_SKEW_SECONDS:
                    self._warn_once(f"clock of {self.hosts[rank]}",
                                    f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the others")
        if len(told) > 1 and all(own):
            fields |= self._pace(own)
        return fields

    def _pace(self, own: Sequence[float]) -> dict[str, Any]:
        of_stage: dict[int, list[float]] = {}
        for stage, seconds in zip(self.stages, own, strict=True):
            of_stage.setdefault(stage, []).append(seconds)
        # Compared with the others of its stage, but once for all of them: to leave out the slowest, or another one that
        # is slow, makes no difference to the median or the spread.
        limits = {stage: slow_from(sorted(times)[:-1]) for stage, times in of_stage.items()}
        slow = {rank: f"rank {rank} on {self.hosts[rank]}" for rank in range(len(own))
                if own[rank] > limits[self.stages[rank]]}
        for rank in slow.keys() - self._slow.keys():
            others = [own[peer] for peer in range(len(own)) if self.stages[peer] == self.stages[rank]
                      and peer not in slow]
            span = f", and the others of its stage {min(others):.3g} to {max(others):.3g} s" if others else ""
            self.console.warn(f"straggler: {slow[rank]} takes {own[rank]:.3g} s a step for forward passes and "
                              f"reading{span}")
        for rank in self._slow.keys() - slow.keys():
            self.console.line(f"{self._slow[rank]} keeps pace again")
        self._slow = slow
        slowest = max(range(len(own)), key=lambda rank: own[rank])
        return {"own_seconds": statistics.median(own), "own_seconds_slowest": own[slowest], "slowest_rank": slowest,
                "stragglers": list(slow.values())}

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            self.console.warn(f"{subject}: {text}")


def slow_from(others: Sequence[float]) -> float:
    """The end of the range of some times; infinite without any."""
    if not others:
        return math.inf
    median = statistics.median(others)
    return max(SLOW * median, median + max(SPREADS * deviation(others), LEAST_DELAY_SECONDS))
