"""Processes that apply a function, each behind a pipe of its own.

They share no queue and no lock, so a process that is killed, for example for lack of memory, is noticed as the end of
its pipe. A process pool would wait for ever for an answer whose worker was killed while it wrote to the shared queue.
A worker ends when its parent does, because its pipe closes.
"""

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from megatron_ltd.errors import DataError

Task = TypeVar("Task")
Answer = TypeVar("Answer")


@contextmanager
def worker_processes(function: Callable[[Task], Answer], count: int) -> Iterator[Callable[[Task], Future[Answer]]]:
    """Starts the processes, gives a function that submits a task to the next idle one, and kills them at the end.

    Args:
        function: at the level of a module; what it raises is raised by the future of its task.
        count: processes.
    """
    context = multiprocessing.get_context("spawn")
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    workers = []
    threads = ThreadPoolExecutor(count, thread_name_prefix="worker")  # each waits for the answer to one task

    def ask(task: Task) -> Answer:
        connection = idle.get()
        try:
            connection.send(task)
            succeeded, answer = connection.recv()
        except (EOFError, OSError) as error:
            raise DataError("A worker process was killed, often for lack of memory. Run again with fewer --workers; "
                            "nothing was written.") from error
        finally:
            idle.put(connection)
        if not succeeded:
            raise answer
        result: Answer = answer
        return result

    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()  # or the pipe would not end with the process
            workers.append((process, ours))
            idle.put(ours)
        yield lambda task: threads.submit(ask, task)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process, _ in workers:
            process.kill()  # what it still does is of no use
        for process, connection in workers:
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
