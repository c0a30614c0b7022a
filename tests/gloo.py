"""Distributed tests in one machine's processes: gloo ranks that start in well under a second.

A fork server imports torch once per test session; every job forks fresh ranks from it, so that nothing leaks
from one test into the next and a rank may be killed without harm. Each rank runs on one thread. All call the function
at once, so that none waits, in a collective whose time is limited, for another that is still importing its modules.

    def sum_over_ranks(rank: int, world_size: int, offset: int) -> int:      # at the level of a module
        total = torch.tensor(rank + offset)
        dist.all_reduce(total)
        return int(total)

    def test_every_rank_is_counted() -> None:
        assert run_ranks(sum_over_ranks, 4, 10) == [46] * 4
"""

import contextlib
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOADED = ("numpy", "pytest", "torch", "torch.distributed.fsdp", "torch.distributed.tensor",
             "torch.distributed.checkpoint", "torch.distributed.pipelining", "safetensors.torch")
"""Imported once by the fork server; none of them starts a thread."""

START_SECONDS = 120.0
"""In which the ranks must have begun, the fork server's imports included; on an idle machine it takes one. A collective
outlasts the job by as long, so that a rank that waits in one is seen to hang."""
GRACE_SECONDS = 0.3
"""After one rank fails, the others may still say what they saw before they are killed."""
STACKS_SECONDS = 10.0
"""In which a rank that hangs has written its stacks, unless it is stopped; on an idle machine it takes no time."""
LOOK_SECONDS = 0.1

BEGUN, GO = b"begun", b"go"
"""A rank says that it has begun, and hears when all have."""

fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload([name for name in PRELOADED if importlib.util.find_spec(name.split(".")[0])])


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds what every failed rank said, first failure first."""


@dataclass
class Outcome:
    """How one rank ended."""

    rank: int
    value: Any = None
    error: str = ""
    """The traceback of an exception, or how the process died or hung; empty when `fn` returned."""
    exit_code: int | None = None
    output: str = ""
    """What the rank wrote to stdout and stderr, and its stacks if it hung."""
    ended_at: float = float("inf")
    """When the parent learnt of it, on the monotonic clock; infinite if the rank had to be killed."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on gloo ranks and return their values in order of rank.

    Args:
        fn: a function at the level of a module; arguments and values are pickled.
        timeout: seconds for the job from when all ranks have begun; ranks that need longer are killed.

    Raises:
        RankFailure: a rank raised, died or hung. The others are killed.
    """
    return _values(_Job(fn, world_size, args, timeout).run(until_first_error=True), timeout)


def launch_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """As `run_ranks`, for code that joins the process group by itself.

    `fn(rank, world_size, init_method, *args)` is called; `init_method` is for `init_process_group`.
    """
    job = _Job(fn, world_size, args, timeout, join_group=False)
    return _values(job.run(until_first_error=True), timeout)


def observe_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0,
) -> list[Outcome]:
    """As `run_ranks`, for ranks that are expected to fail: waits for all and returns how each one ended."""
    return _Job(fn, world_size, args, timeout).run(until_first_error=False)


def _values(outcomes: list[Outcome], timeout: float) -> list[Any]:
    failed = sorted((outcome for outcome in outcomes if outcome.error), key=lambda outcome: outcome.ended_at)
    if failed:
        said = [f"--- rank {o.rank} ---\n{o.error.rstrip()}\n{o.output[-4000:].rstrip()}" for o in failed]
        headline = f"{len(failed)} of {len(outcomes)} ranks failed (timeout {timeout:g} s)"
        raise RankFailure("\n".join([headline, *said]))
    return [outcome.value for outcome in outcomes]


@dataclass
class _Job:
    """One function on several ranks."""

    fn: Callable[..., Any]
    world_size: int
    args: tuple[Any, ...]
    timeout: float
    join_group: bool = True
    scratch: str = ""

    def run(self, until_first_error: bool) -> list[Outcome]:
        with tempfile.TemporaryDirectory(prefix="gloo-ranks-") as self.scratch:
            ranks = [_Rank(self, rank) for rank in range(self.world_size)]
            try:
                _await_begin(ranks)
                for rank in ranks:
                    rank.go()
                _await(ranks, time.monotonic() + self.timeout, until_first_error)
                return [rank.outcome for rank in ranks]
            finally:
                for rank in ranks:
                    rank.close()


class _Rank:
    """The parent's view of one rank's process."""

    def __init__(self, job: _Job, rank: int):
        self.outcome, self.begun = Outcome(rank), False
        self.output = os.path.join(job.scratch, f"output-{rank}")
        open(self.output, "w").close()
        self.connection, child_end = fork_server.Pipe()
        self.process = fork_server.Process(target=_rank_main, args=(job, rank, self.output, child_end))
        self.process.start()
        child_end.close()

    @property
    def running(self) -> bool:
        return not self.outcome.error and self.outcome.ended_at == float("inf")

    def go(self) -> None:
        """Let it call the function."""
        with contextlib.suppress(OSError):  # it has died
            self.connection.send_bytes(GO)

    def collect(self) -> None:
        """Take what the rank sent: that it has begun, then its result. One that ended without a result has died."""
        exit_code = self.process.exitcode  # before looking for what was sent: an ended process sends nothing more
        while self.connection.poll():
            try:
                answer = self.connection.recv_bytes()
            except (EOFError, ConnectionResetError):
                self.process.join(5)
                exit_code = self.process.exitcode
                break
            if answer == BEGUN:
                self.begun = True
                continue
            self.outcome.value, self.outcome.error = pickle.loads(answer)
            self.outcome.ended_at = time.monotonic()
            return
        if exit_code is not None:
            self.outcome.error = f"died with exit code {exit_code} before returning"
            self.outcome.ended_at = time.monotonic()

    def dump_stacks(self) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)

    def written(self) -> int:
        """Bytes of its output."""
        return os.path.getsize(self.output)

    def close(self) -> None:
        if self.outcome.ended_at == float("inf"):
            self.process.kill()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.outcome.exit_code = self.process.exitcode
        with open(self.output, errors="replace") as stream:
            self.outcome.output = stream.read()
        self.connection.close()
        self.process.close()


def _await_begin(ranks: list[_Rank]) -> None:
    """Wait until every rank has begun, or one has failed, or time is up."""
    deadline = time.monotonic() + START_SECONDS
    while late := [rank for rank in ranks if rank.running and not rank.begun]:
        left = deadline - time.monotonic()
        if left <= 0 or any(rank.outcome.error for rank in ranks):
            return
        wait([x for rank in late for x in (rank.connection, rank.process.sentinel)], timeout=left)
        for rank in late:
            rank.collect()


def _await(ranks: list[_Rank], deadline: float, until_first_error: bool) -> None:
    """Collect results until all ranks have ended or time is up; then mark those that still run as failed."""
    failed = False
    while running := [rank for rank in ranks if rank.running]:
        if until_first_error and not failed and any(rank.outcome.error for rank in ranks):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        left = deadline - time.monotonic()
        if left <= 0:
            break
        wait([x for rank in running for x in (rank.connection, rank.process.sentinel)], timeout=left)
        for rank in running:
            rank.collect()
    _dump_stacks(running)
    for rank in running:
        rank.outcome.error = "was still running after another rank failed" if failed else "hung; its stacks:"


def _dump_stacks(ranks: list[_Rank]) -> None:
    """Let each rank write its stacks; they are there once its output has grown and grows no more."""
    before = [rank.written() for rank in ranks]
    for rank in ranks:
        rank.dump_stacks()
    sizes, deadline = before, time.monotonic() + STACKS_SECONDS
    while ranks and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        last, sizes = sizes, [rank.written() for rank in ranks]
        if all(size > old and size == earlier for size, old, earlier in zip(sizes, before, last, strict=True)):
            return


def _rank_main(job: _Job, rank: int, output: str, connection: Connection) -> None:
    """What a rank's process runs."""
    with open(output, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    dist = torch.distributed
    init_method = f"file://{job.scratch}/rendezvous"
    try:
        if job.join_group:
            dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=job.world_size,
                                    timeout=timedelta(seconds=job.timeout + START_SECONDS))
            dist.barrier()  # all pairs are connected before the first rank may leave
            where: tuple[Any, ...] = ()
        else:
            where = (init_method,)
        connection.send_bytes(BEGUN)
        connection.recv_bytes()
        value = job.fn(rank, job.world_size, *where, *job.args)
        answer = pickle.dumps((value, ""))
    except BaseException:
        answer = pickle.dumps((None, traceback.format_exc()))
    connection.send_bytes(answer)
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
