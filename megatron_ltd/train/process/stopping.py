"""When a run stops before its last step: signals, --exit-interval, --exit-duration-in-mins."""

import os
import signal
import time
from types import FrameType
from typing import Any

from megatron_ltd.config import TrainingConfig
from megatron_ltd.errors import EXIT_COMPLETE, EXIT_ON_INTERVAL, EXIT_ON_SIGNAL

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A scheduler's request, Ctrl-C, a closed terminal."""
ONE_REQUEST_SECONDS = 1.0
"""One Ctrl-C can arrive twice, from the terminal and from a launcher that passes it on."""


class StopWatcher:
    """Whether this process has been asked to stop. Processes tell each other in the step's own all-reduce, so that all
    of them stop after the same step, whoever was asked.

    As a context manager it installs the handlers of the signals, and puts the old ones back. A second Ctrl-C ends the
    process at once; torchrun passes it on as SIGTERM.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.signalled = False
        self._started = time.monotonic()
        self._interrupted_at: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopWatcher":
        for number in STOP_SIGNALS if self.config.exit_signal_handler else ():
            # What nohup or a shell's background job ignores stays ignored.
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now if number == signal.SIGINT else None
        elif number != signal.SIGHUP and now - self._interrupted_at > ONE_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

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
