"""The harness of the distributed tests: values come back, and failures of every kind are told."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gloo import RankFailure, launch_ranks, observe_ranks, run_ranks


def sum_over_ranks(rank: int, world_size: int, offset: int) -> torch.Tensor:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return total


def test_values_come_back_in_order_of_rank() -> None:
    assert run_ranks(sum_over_ranks, 4, 10) == [46] * 4
    assert run_ranks(own_rank, 3) == [0, 1, 2]


def own_rank(rank: int, world_size: int) -> int:
    assert torch.get_num_threads() == 1
    return dist.get_rank()


def raise_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("what went wrong")
    dist.barrier()


def test_the_first_exception_is_told_first() -> None:
    with pytest.raises(RankFailure, match="(?s)ranks failed.*?--- rank 1 ---.*?ValueError: what went wrong"):
        run_ranks(raise_on_rank_1, 3)


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        print("last words", flush=True)
        os._exit(3)
    dist.barrier()


def test_a_rank_that_dies_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="(?s)--- rank 1 ---\ndied with exit code 3.*last words"):
        run_ranks(die_on_rank_1, 2)
    outcomes = observe_ranks(die_on_rank_1, 2)
    assert outcomes[1].exit_code == 3 and "last words" in outcomes[1].output
    assert "RuntimeError" in outcomes[0].error


def hang_on_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(600)
    dist.barrier()


def test_a_hang_ends_at_the_timeout_and_shows_where() -> None:
    with pytest.raises(RankFailure, match="(?s)hung; its stacks:.*in hang_on_rank_0.*in barrier"):
        run_ranks(hang_on_rank_0, 2, timeout=2)


def leave(rank: int, world_size: int) -> None:
    raise SystemExit(0)


def test_leaving_with_exit_status_0_is_not_success() -> None:
    with pytest.raises(RankFailure, match="SystemExit: 0"):
        run_ranks(leave, 1)


def join(rank: int, world_size: int, init_method: str, backend: str) -> int:
    assert not dist.is_initialized()
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size)
    return int(sum_over_ranks(rank, world_size, 0))


def test_ranks_may_join_the_group_by_themselves() -> None:
    assert launch_ranks(join, 2, "gloo") == [1, 1]


class Late:
    """Of the processes that receive it, the last to do so takes a second longer, as if its imports did."""

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes = folder, processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / str(os.getpid())).touch()
        if len(list(self.folder.iterdir())) == self.processes:
            time.sleep(1.0)
            (self.folder / "all are here").touch()


def finds_all_here(rank: int, world_size: int, init_method: str, late: Late) -> bool:
    return (late.folder / "all are here").exists()


def test_no_rank_begins_before_all_have_imported_their_modules(tmp_path: Path) -> None:
    assert launch_ranks(finds_all_here, 3, Late(tmp_path, 3)) == [True] * 3
