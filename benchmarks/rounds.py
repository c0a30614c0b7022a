"""Steps timed in turn, so that what else the machine does falls on all of them alike."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def processor_seconds(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor time of each step in each round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - started)
        print(f"round {number}/{rounds}", file=sys.stderr, flush=True)
    return seconds
