"""Processes that apply a function, each behind a pipe of its own.

They share no queue and no lock, so one that is killed, for lack of memory say, is noticed as the end of its pipe; a
process pool whose worker dies while it holds the pool's lock waits for ever. A worker ends when its parent does: its
pipe closes.
"""

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron_ltd.errors import DataError

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class WorkerProcesses(Generic[Task, Answer]):
    """Answers to tasks, several at a time.

    Args:
        function: at the level of a module; what it raises is raised by the future of its task.
        count: processes.
    """

    def __init__(self, function: Callable[[Task], Answer], count: int):
        context = multiprocessing.get_context("spawn")
        self._idle: queue.SimpleQueue[tuple[Any, Connection]] = queue.SimpleQueue()
        self._workers: list[tuple[Any, Connection]] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()  # or the pipe would not end with the process
            self._workers.append((process, ours))
            self._idle.put((process, ours))
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")

    def submit(self, task: Task) -> Future[Answer]:
        """Have a task done by the next process that is free."""
        return self._threads.submit(self._ask, task)

    def _ask(self, task: Task) -> Answer:
        process, connection = self._idle.get()
        try:
            connection.send(task)
            succeeded, answer = connection.recv()
        except (EOFError, OSError) as error:
            raise DataError("A worker process was killed, often for lack of memory. Run again with fewer --workers; "
                            "nothing was written.") from error
        finally:
            self._idle.put((process, connection))
        if not succeeded:
            raise answer
        result: Answer = answer
        return result

    def __enter__(self) -> "WorkerProcesses[Task, Answer]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process, _ in self._workers:
            process.kill()  # what it still does is of no use
        for process, connection in self._workers:
            process.join()
            connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """A worker: one thread, Ctrl-C left to the parent, one task after the other until the pipe ends."""
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(task)
        except Exception as error:
            answer = False, error
        try:
            connection.send(answer)
        except OSError:
            return  # the parent is gone
