"""When a run stops before its last step: signals, --exit-interval, --exit-duration-in-mins."""

import os
import signal
import time
from types import FrameType
from typing import Any

from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.errors import EXIT_COMPLETE, EXIT_ON_INTERVAL, EXIT_ON_SIGNAL

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A scheduler's request, Ctrl-C, a closed terminal."""
ONE_REQUEST_SECONDS = 1.0
"""One Ctrl-C can arrive twice, from the terminal and from a launcher that forwards it."""


class StopWatcher:
    """Whether this process has been asked to stop. The requests are combined in the step's own all-reduce, so that all
    processes stop after the same step, whichever was asked.

    As a context manager it installs the signal handlers and restores the old ones. A second Ctrl-C ends the process at
    once; torchrun forwards it as SIGTERM.

    Args:
        leaves: keep the handlers after a run that no error ended: its process ends too, and a signal that comes then
            must not kill it.
    """

    def __init__(self, config: TrainingConfig, leaves: bool = False):
        self.config, self.leaves = config, leaves
        self.signalled = False
        self._started = time.monotonic()
        self._interrupted_at: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopWatcher":
        for number in STOP_SIGNALS if self.config.exit_signal_handler else ():
            # Signals ignored under nohup or by a shell's background job stay ignored.
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.leaves and kind is None:
            return
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
        """How this process was asked to stop: 0 not at all, 1 by a time limit, 2 by a signal."""
        if self.signalled:
            return 2
        limit = self.config.exit_duration_in_mins
        return int(limit is not None and time.monotonic() - self._started > 60.0 * limit)

    def exit_code(self, step: int, total_steps: int, agreed_level: int) -> int | None:
        """The exit code if the run ends after `step`; None if it continues.

        Args:
            agreed_level: the highest `level` of any process.
        """
        if step >= total_steps:
            return EXIT_COMPLETE
        if agreed_level > 0:
            return EXIT_ON_SIGNAL if agreed_level == 2 else EXIT_ON_INTERVAL
        interval = self.config.exit_interval
        return EXIT_ON_INTERVAL if interval is not None and step % interval == 0 else None
