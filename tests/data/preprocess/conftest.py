"""Short runs do not wait for worker processes; in these tests they do, so that those take part."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_ltd.data.preprocess import in_order
from megatron_ltd.data.preprocess.worker_processes import worker_processes


@contextmanager
def _started(function: Callable[[Any], Any], count: int) -> Iterator[Callable[[Any], Future[Any]]]:
    with worker_processes(function, count) as submit:
        for future in [submit(None) for _ in range(count)]:
            future.result()
        yield submit


@pytest.fixture(autouse=True)
def workers_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_order, "_HELP_SECONDS", -1.0)
    monkeypatch.setattr(in_order, "worker_processes", _started)
