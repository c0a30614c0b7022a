"""Processes and hosts that fall out of line are named, from numbers that travel with a step."""

import itertools
import re
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.log import Console
from megatron_ltd.model.stack import Stack
from megatron_ltd.train import trainer
from megatron_ltd.train.faults.peers import OwnTime, Peers, slow_from
from tests.gloo import launch_ranks
from tests.train.faults.test_bad_steps import SHORT
from tests.train.runs import Corpus, Ending, Settings, pretrain, read_lines

SLOW_STEPS = (6, 7)


def pretrain_on_a_slow_machine(rank: int, world_size: int, init_method: str, settings: Settings) -> Ending:
    """`pretrain` with a second rank that needs much longer for some steps, and a clock that is a minute behind."""
    whole, wall, passes = Stack.forward, time.time, itertools.count(2)

    def forward(stack: Stack, *args: Any) -> torch.Tensor:
        if rank == 1 and next(passes) // 2 in SLOW_STEPS:
            time.sleep(0.3)
        return whole(stack, *args)

    with mock.patch.object(Stack, "forward", forward), \
            mock.patch.object(time, "time", lambda: wall() - 60 * rank), \
            mock.patch.object(trainer, "free_memory", lambda: 0.01 if rank == 1 else 0.5):
        return pretrain(rank, world_size, init_method, settings)


def test_a_rank_that_takes_longer_than_the_others_is_named_while_it_does(corpus: Corpus, tmp_path: Path) -> None:
    settings = {**SHORT, **corpus.settings, "log_interval": 2, "train_iters": 12, "micro_batch_size": 1,
                "metrics_file": str(tmp_path / "metrics.jsonl")}
    endings = launch_ranks(pretrain_on_a_slow_machine, 2, settings, timeout=120)
    assert {ending.code for ending in endings} == {0}, endings[0].said
    lines = {line["step"]: line for line in read_lines(tmp_path / "metrics.jsonl")}
    slow = lines[8]
    assert slow["slowest_rank"] == 1 and slow["own_seconds_slowest"] >= 0.6
    assert slow["stragglers"] == [name for name in slow["stragglers"] if name.startswith("rank 1 on ")] != []
    assert endings[0].said.count("straggler: rank 1 on ") >= 1 and "straggler" not in endings[1].said
    # From the median, which of two is their mean. A busy machine may wake one process seconds after the other.
    assert slow["clock_skew_seconds"] == pytest.approx(30, abs=5)
    [told] = re.findall(r": ([0-9.]+) s ahead of the others", endings[0].said)  # of a host, by the first of its ranks
    assert float(told) == pytest.approx(30, abs=5)
    assert slow["host_memory_free"] == 0.01


def test_ranges() -> None:
    assert 1.4 < slow_from([1.0]) < 1.6 and slow_from([]) > 1.0 and slow_from([0.01]) > 0.03
    assert slow_from([1.0, 1.01, 0.99, 1.0]) < 1.6 < slow_from([1.0, 1.2, 0.8, 1.1])


def test_only_processes_with_the_same_part_of_the_model_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    found = Peers(["a", "a", "b", "b"], [0, 0, 1, 1], Console())
    assert found.hear([(0.0, 0.5, 0.0)] * 4) == {"host_memory_free": 0.5}
    even = [(1.0, 0.5, 9.0), (1.1, 0.5, 9.0), (3.0, 0.5, 9.0), (3.1, 0.04, 9.0)]
    assert found.hear(even) == {"host_memory_free": 0.04, "clock_skew_seconds": 0.0, "own_seconds": 2.05,
                                "own_seconds_slowest": 3.1, "slowest_rank": 3, "stragglers": []}
    fields = found.hear([even[0], (2.0, 0.5, 9.0), *even[2:]])
    assert fields["stragglers"] == ["rank 1 on a"]
    found.hear(even)
    out, err = capsys.readouterr()
    assert err == ("WARNING: memory of b: 4.0% left\nWARNING: straggler: rank 1 on a takes 2 s a step for forward "
                   "passes and reading, and the others of its stage 1 to 1 s\n")
    assert out == "rank 1 on a keeps pace again\n"


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0.1, 0.3, 0.31, 1.0, 1.06, 2.0, 9.0])), min_size=2,
                max_size=9))
def test_each_is_compared_with_the_others_of_its_stage(ranks: list[tuple[int, float]]) -> None:
    stages, own = zip(*ranks, strict=True)
    found = Peers(["a"] * len(ranks), stages, Console(False)).hear([(seconds, 0.5, 0.0) for seconds in own])
    slow = [rank for rank, (stage, seconds) in enumerate(ranks) if seconds > slow_from(
        [other for peer, (its_stage, other) in enumerate(ranks) if peer != rank and its_stage == stage])]
    assert found["stragglers"] == [f"rank {rank} on a" for rank in slow]


def test_a_thousand_processes_are_compared_with_one_look_at_each_stage() -> None:
    found = Peers(["a"] * 1024, [0, 1] * 512, Console(False))
    with mock.patch.object(statistics, "median", wraps=statistics.median) as looks:
        assert found.hear([(1.0, 0.5, 9.0)] * 1000 + [(3.0, 0.5, 9.1)] * 24)["stragglers"] == [
            f"rank {rank} on a" for rank in range(1000, 1024)]
    assert looks.call_count <= 10


def test_own_time_is_that_of_training_by_step_after_the_first() -> None:
    stage = torch.nn.Linear(2, 2)
    with mock.patch.object(time, "monotonic", side_effect=[0.0, 9.0, 11.0, 11.5, 12.0, 14.0]):
        own = OwnTime([stage], on_gpu=False)
        assert own.take() == 0.0
        for _ in range(3):
            stage(torch.ones(2))
            own.step(seconds=0.25)
        stage.eval()(torch.ones(2))
    assert own.take() == (0.5 + 2.0 + 2 * 0.25) / 2 and own.take() == 0.0


def test_times_do_not_pile_up_between_two_lines_of_the_log() -> None:
    stage = torch.nn.Linear(2, 2)
    own = OwnTime([stage], on_gpu=False)
    for _ in range(9):
        stage(torch.ones(2))
        own.step(seconds=0.25)
    assert own._spans == [] and own.take() > 0.25
