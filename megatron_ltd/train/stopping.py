"""When a run stops before its last step: signals, --exit-interval, --exit-duration-in-mins."""

import signal
import time
from types import FrameType
from typing import Any

from megatron_ltd.config import TrainingConfig
from megatron_ltd.errors import EXIT_COMPLETE, EXIT_ON_INTERVAL, EXIT_ON_SIGNAL


class StopWatcher:
    """Whether this process has been asked to stop. Processes tell each other in the step's own all-reduce, so that all
    of them stop after the same step, whoever was asked.

    As a context manager it installs the handler of SIGTERM, and puts the old one back.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.signalled = False
        self._started = time.monotonic()
        self._previous: Any = None

    def __enter__(self) -> "StopWatcher":
        if self.config.exit_signal_handler:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def level(self) -> int:
        """How this process was asked to stop: 0 not at all, 1 its time is over, 2 by a signal."""
        if self.signalled:
            return 2
        limit = self.config.exit_duration_in_mins
        return int(limit is not None and time.monotonic() - self._started > 60.0 * limit)

    def exit_code(self, step: int, total_steps: int, agreed_level: int) -> int | None:
        """How the run ends after `step`; None if it goes on.

        Args:
            agreed_level: the highest `level` of any process.
        """
        if step >= total_steps:
            return EXIT_COMPLETE
        if agreed_level > 0:
            return EXIT_ON_SIGNAL if agreed_level == 2 else EXIT_ON_INTERVAL
        interval = self.config.exit_interval
        return EXIT_ON_INTERVAL if interval is not None and step % interval == 0 else None
