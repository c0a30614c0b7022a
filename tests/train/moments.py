"""Moments in the life of a rank at which something can be made to happen to it, counted rather than timed."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_ltd.model.stack import Stack
from megatron_ltd.train.process.stopping import StopWatcher
from tests.train.runs import Ending, Settings, pretrain

_OPERATIONS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"})
"""Audit events of Python."""


class Moments:
    """Counts the moments of this process from now on: before each training step, each pass through the layers, and each
    operation on a file under a folder. There is one in a process, and it stays: for ranks that end with the test.

    Args:
        at: of each kind ("step", "layers", "files") or of all together ("any"), the moment at which `action` is called.
    """

    def __init__(self, folder: Path, kind: str, at: int | None, action: Callable[[], None]):
        self.folder, self.kind, self.at, self.action, self.count = str(folder), kind, at, action, 0
        layers, level = Stack.forward, StopWatcher.level

        def forward(stack: Stack, *args: Any) -> torch.Tensor:
            self.tick("layers")
            return layers(stack, *args)

        def level_at_step(watcher: StopWatcher) -> int:
            self.tick("step")
            return level(watcher)

        mock.patch.object(Stack, "forward", forward).start()
        mock.patch.object(StopWatcher, "level", level_at_step).start()
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _OPERATIONS and str(args[0]).startswith(self.folder):
            self.tick("files")

    def tick(self, kind: str) -> None:
        if self.kind in (kind, "any"):
            self.count += 1
            if self.count == self.at:
                self.action()


def pretrain_with_signal(rank: int, world_size: int, init_method: str, settings: Settings, folder: Path, victim: int,
                         number: int, kind: str, at: int | None) -> tuple[Ending, int]:
    """`pretrain` on one rank, with the number of its moments; the victim sends itself a signal at one of them.

    Args:
        number: of the signal.
        kind, at: see `Moments`.
    """
    moments = Moments(folder, kind, at if rank == victim else None, lambda: os.kill(os.getpid(), number))
    return pretrain(rank, world_size, init_method, settings), moments.count
