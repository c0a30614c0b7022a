"""The attempts of a restarted run share a store, and read nothing of each other in it."""

import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_ltd.train.process import attempt
from megatron_ltd.train.process.exits import lost_peer
from tests.gloo import fork_server

TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def launcher_store() -> Iterator[dist.TCPStore]:
    """The store that a launcher keeps for all attempts."""
    yield dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


@pytest.fixture(autouse=True)
def environment(launcher_store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(launcher_store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")


def meet(world_size: int) -> None:
    """One attempt: each rank writes under its number, in a thread of its own, and reads what the others wrote."""
    def one(rank: int) -> list[bytes]:
        store = attempt.attempt_store("env://", rank, world_size, TIMEOUT)
        assert not store.check([f"{rank}"]), "this was written by an earlier attempt"
        store.set(f"{rank}", f"rank {rank} of {world_size}")
        return [store.get(f"{other}") for other in range(world_size)]

    with ThreadPoolExecutor(world_size) as pool:
        for found in pool.map(one, range(world_size)):
            assert found == [f"rank {other} of {world_size}".encode() for other in range(world_size)]


def test_attempts_of_any_size_find_only_themselves() -> None:
    for world_size in (3, 3, 2, 4, 1):
        meet(world_size)


def test_calls_that_an_aborted_attempt_left_are_no_hindrance(launcher_store: dist.TCPStore) -> None:
    launcher_store.set("call/1", "nobody waits for this")
    meet(3)


def test_an_attempt_is_not_ended_by_what_nccl_asked_of_the_one_before_it(launcher_store: dist.TCPStore) -> None:
    """torch's monitor looks in the bare store, and ends the process some minutes after it finds the request there."""
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    found = re.search(r'kStoreDumpKey = "(.+)"', (headers / "ProcessGroupNCCL.hpp").read_text())
    assert found is not None
    launcher_store.set(found[1], b"\x03\0\0\0")
    with ThreadPoolExecutor(2) as pool:
        for store in pool.map(lambda rank: attempt.attempt_store("env://", rank, 2, TIMEOUT), range(2)):
            assert isinstance(store, dist.PrefixStore)
            assert not store._underlying_non_prefix_store.check([found[1]])


def test_a_process_that_does_not_arrive_is_named() -> None:
    readings = itertools.count(0, 9)  # seconds; on a busy machine, connecting may take longer than a test wants to wait
    clock = mock.Mock(monotonic=lambda: next(readings), sleep=time.sleep)
    with mock.patch.object(attempt, "time", clock), pytest.raises(
            dist.DistStoreError, match=r"2 of 3 processes did not arrive within 20 s, rank 1 among them"):
        attempt.attempt_store("env://", 0, 3, TIMEOUT)
    assert next(readings) == 9 * 4, "it waited until the time was over, and no longer"


@pytest.mark.parametrize("init_method", ["env://", "tcp://localhost:{port}"])
def test_a_store_whose_process_is_stopped_before_it_greets_is_noticed(
    monkeypatch: pytest.MonkeyPatch, init_method: str,
) -> None:
    """The system accepts the connection in its place; torch's client waits for the greeting without a limit."""
    with socket.create_server(("localhost", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(dist.DistError) as caught:
            attempt.attempt_store(init_method.format(port=port), 1, 2, timedelta(seconds=1))
    assert lost_peer(caught.value)


def keep_a_store(answers: Connection) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    answers.send(store.port)
    store.set_timeout(TIMEOUT)
    attempt._invite(store, 2, TIMEOUT)
    answers.send("joined")
    time.sleep(60)


def test_a_store_whose_process_is_stopped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host acknowledges what is sent to it, and torch's client asks it to forget a wait that took too long."""
    answers, theirs = fork_server.Pipe(duplex=False)
    process = fork_server.Process(target=keep_a_store, args=(theirs,))
    process.start()
    try:
        monkeypatch.setenv("MASTER_PORT", str(answers.recv()))
        store = attempt.attempt_store("env://", 1, 2, timedelta(seconds=2))
        assert answers.recv() == "joined" and process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(dist.DistError) as raised:
            store.get("what nobody has written")
        print(f"noticed after {time.monotonic() - started:.1f} s, of which 2 are the timeout")
        assert lost_peer(raised.value)
    finally:
        process.kill()
        process.join()
