"""NCCL's processes leave their groups together: a process that fails must not wait for the others, which wait for it.

Without a GPU the rule is enforced by a stand-in for `destroy_process_group`: it returns once all have called it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_ltd.errors import EXIT_COMPLETE, EXIT_INTERNAL, EXIT_PEER_LOST, ConfigError
from megatron_ltd.log import Console
from megatron_ltd.train import trainer
from megatron_ltd.train.process import launch
from tests.gloo import launch_ranks, run_ranks
from tests.train.runs import pretrain
from tools.commands.checkpoint_model import exit_code_of_all

WAIT_SECONDS = 60.0
SETTINGS: dict[str, Any] = {
    "mock_data": True, "vocab_size": 64, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 16,
    "micro_batch_size": 1, "lr": 1e-3, "train_iters": 3}


def together(rank: int, ranks: int, folder: str) -> Callable[[], None]:
    """What leaves the process group together with all others.

    Raises:
        TimeoutError: one of them never leaves.
    """
    destroy = dist.destroy_process_group

    def leave() -> None:
        Path(folder, str(rank)).touch()
        deadline = time.monotonic() + WAIT_SECONDS
        while len(list(Path(folder).iterdir())) < ranks:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} waits for the others to leave")
            time.sleep(0.01)
        destroy()

    return leave


def like_nccl(rank: int, ranks: int, folder: str) -> Any:
    return mock.patch.multiple(dist, destroy_process_group=together(rank, ranks, folder),
                               get_backend_config=lambda: "cpu:gloo,cuda:nccl")


def run_of(rank: int, ranks: int, init_method: str, folder: str, failing: int | None) -> int:
    """The exit code of a run in which one rank fails in its second step."""
    compute, steps = trainer.train_step, iter((1, 2, 3))

    def step(*args: Any, **settings: Any) -> Any:
        if next(steps) == 2 and rank == failing:
            raise ArithmeticError("only here")
        return compute(*args, **settings)

    with like_nccl(rank, ranks, folder), mock.patch.object(trainer, "train_step", step):
        return pretrain(rank, ranks, init_method, SETTINGS).code


def test_a_process_that_fails_does_not_wait_for_the_others_to_leave(tmp_path: Path) -> None:
    assert launch_ranks(run_of, 2, str(tmp_path), 1, timeout=240) == [EXIT_PEER_LOST, EXIT_INTERNAL]
    assert not list(tmp_path.iterdir())


def test_processes_that_have_finished_leave_together(tmp_path: Path) -> None:
    assert launch_ranks(run_of, 2, str(tmp_path), None, timeout=240) == [EXIT_COMPLETE] * 2
    assert len(list(tmp_path.iterdir())) == 2


def tool_of(rank: int, ranks: int, folder: str) -> int:
    def fail(console: Console) -> None:
        if rank == 1:
            raise ConfigError("only here")
        dist.barrier()

    with like_nccl(rank, ranks, folder):
        if rank == 1:
            return exit_code_of_all(fail)
        with pytest.raises(RuntimeError, match="gloo|peer"):
            exit_code_of_all(fail)
    return 0


def test_a_tool_that_fails_on_one_process_does_not_wait_for_the_others_to_leave(tmp_path: Path) -> None:
    assert run_ranks(tool_of, 2, str(tmp_path), timeout=240) == [0, ConfigError.exit_code]


def alone(rank: int, ranks: int, folder: str) -> bool:
    with like_nccl(rank, ranks, folder):
        launch.stop(failed=True)
    return dist.is_initialized()


def test_a_single_process_always_leaves(tmp_path: Path) -> None:
    assert run_ranks(alone, 1, str(tmp_path)) == [False]
