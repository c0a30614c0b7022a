"""A process that hangs is named, with the stacks of all; a killed one stops the others at once."""

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_ltd.model.stack import Stack
from megatron_ltd.train.process import stacks
from tests import gloo
from tests.gloo import RankFailure, launch_ranks
from tests.train.faults.test_bad_steps import SHORT
from tests.train.runs import Corpus, Ending, Settings, pretrain

TIMEOUT_MINUTES = 0.05


def get_stuck(number: int, folder: Path) -> None:
    """Send this process a signal, and do not come back from it."""
    (folder / "stuck-at").write_text(str(time.time()))
    os.kill(os.getpid(), number)
    time.sleep(600)


def pretrain_and_get_stuck(rank: int, world_size: int, init_method: str, settings: Settings, folder: Path,
                           number: int) -> Ending:
    """`pretrain`, of which the second rank does not come back from its sixth pass through the layers."""
    whole, passes = Stack.forward, itertools.count(1)

    def forward(stack: Stack, *args: Any) -> torch.Tensor:
        if rank == 1 and next(passes) == 6:
            get_stuck(number, folder)
        return whole(stack, *args)

    with mock.patch.object(Stack, "forward", forward):
        ending = pretrain(rank, world_size, init_method, settings)
    (folder / f"rank-{rank}").write_text(json.dumps([time.time(), ending.code, ending.said]))
    return ending


def stuck_run(corpus: Corpus, folder: Path, number: int) -> tuple[float, int, str]:
    """Seconds until the first rank had ended, its exit code and what it said."""
    settings = {**SHORT, **corpus.settings, "save": str(folder / "checkpoints"),
                "distributed_timeout_minutes": TIMEOUT_MINUTES}
    with mock.patch.object(gloo, "GRACE_SECONDS", 60.0), pytest.raises(RankFailure, match="rank 1"):
        launch_ranks(pretrain_and_get_stuck, 2, settings, folder, int(number), timeout=60)
    ended, code, said = json.loads((folder / "rank-0").read_text())
    return ended - float((folder / "stuck-at").read_text()), code, said


def test_a_process_that_hangs_is_named_with_the_stacks_of_all(corpus: Corpus, tmp_path: Path) -> None:
    """It is stopped, which is harder than one that runs: it has to be continued to say where it is."""
    seconds, code, said = stuck_run(corpus, tmp_path, signal.SIGSTOP)
    print(f"stopped: ended after {seconds:.1f} s, of which {60 * TIMEOUT_MINUTES:.0f} are the timeout")
    assert code == 40 and "rank 1 on " in said and "did not answer in time, while the others waited in" in said
    record = json.loads((tmp_path / "checkpoints" / "exit.json").read_text())
    assert record["code"] == 40 and record["reason"].startswith("rank 1 on ")
    written = (tmp_path / "checkpoints" / "stacks.txt").read_text()
    waiting, hung = written.split("===== rank 1 on ")
    assert "===== rank 0 on " in waiting and "train/step.py" in waiting and "Error" in waiting
    assert "which did not answer" in hung and "in get_stuck" in hung and "train/step.py" in hung


def test_a_killed_process_stops_the_others(corpus: Corpus, tmp_path: Path) -> None:
    seconds, code, said = stuck_run(corpus, tmp_path, signal.SIGKILL)
    print(f"killed: ended after {seconds:.1f} s")
    assert code == 40 and "stopped, since another process failed" in said
    assert not (tmp_path / "checkpoints" / "stacks.txt").exists()


class CountingStore:
    """A store of which the number of requests is known."""

    def __init__(self) -> None:
        self.store, self.requests = dist.HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


def test_a_thousand_processes_do_not_ask_the_store_for_each_other(tmp_path: Path) -> None:
    """Two of another host hang. All but the one that writes ask for their own host alone."""
    store, own = CountingStore(), stacks.told(0)
    processes = [["here", *own[1:]] if rank < 8 else [f"host-{rank // 8}", f"place-{rank // 8}", rank, rank, 0]
                 for rank in range(1024)]
    for rank in range(1024):
        if rank not in (100, 101):
            store.store.set(f"stack/{rank}", f"stack of {rank}")
    requests = []
    with mock.patch.object(time, "sleep"):
        for rank in (3, 5):
            store.requests = 0
            try:
                raise RuntimeError("Timed out waiting")
            except RuntimeError as error:
                stacks.tell(error, rank, processes, store, str(tmp_path))  # type: ignore[arg-type]
            requests.append(store.requests)
    assert requests[0] < 1100 and requests[1] < 5
    written = (tmp_path / "stacks.txt").read_text()
    assert written.count("which did not answer") == 2 and "===== rank 100 on host-12, process 100, which" in written
    assert "stack of 1023" in written and written.count("no stack") == 2
