"""The order of passes is held against torch's own schedules."""

from collections import Counter
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from megatron_ltd.plan.layouts.in_flight import Schedule, held_activations

KINDS: dict[str, Any] = {"interleaved": torch_schedules.ScheduleInterleaved1F1B,
                         "interleaved-zero-bubble": torch_schedules.ScheduleInterleavedZeroBubble,
                         "zbv": torch_schedules.ScheduleZBVZeroBubble}


def torch_order(name: str, pp: int, chunks: int, microbatches: int, rank: int, splits: bool) -> list[tuple[str, int]]:
    """What torch's schedule does on a rank, without its idle slots and without what frees nothing."""
    schedule = KINDS[name].__new__(KINDS[name])
    schedule.pp_group_size, schedule.n_local_stages, schedule.num_stages = pp, chunks, pp * chunks
    schedule._n_microbatches, schedule.microbatches_per_round = microbatches, microbatches // max(1, microbatches // pp)
    kinds = torch_schedules._ComputationType
    frees = {kinds.FULL_BACKWARD, kinds.BACKWARD_WEIGHT if splits else kinds.BACKWARD_INPUT}
    actions = [action for action in schedule._calculate_single_rank_operations(rank) if action is not None]
    chunk = (lambda stage: int(stage >= pp)) if name == "zbv" else (lambda stage: stage // pp)
    return [("forward" if action.computation_type == kinds.FORWARD else "free", chunk(action.stage_index))
            for action in actions if action.computation_type == kinds.FORWARD or action.computation_type in frees]


@pytest.mark.parametrize(("name", "pp", "chunks", "microbatches"), [
    ("interleaved", 2, 2, 4), ("interleaved", 4, 3, 8), ("interleaved", 4, 2, 12), ("interleaved", 4, 2, 2),
    ("interleaved-zero-bubble", 2, 2, 4), ("interleaved-zero-bubble", 4, 3, 8),
    ("zbv", 2, 2, 4), ("zbv", 4, 2, 9), ("zbv", 4, 2, 2)])
@pytest.mark.parametrize("splits", [False, True])
def test_passes_come_in_the_order_of_the_engine(name: str, pp: int, chunks: int, microbatches: int,
                                                splits: bool) -> None:
    schedule = Schedule(name, pp, chunks, microbatches, splits and name != "interleaved")
    for rank in range(pp):
        ours = [(kind, chunk) for kind, chunk, _ in schedule.passes(rank)]
        assert ours == torch_order(name, pp, chunks, microbatches, rank, schedule.splits)


def test_1f1b_holds_one_microbatch_for_each_stage_from_its_own_on() -> None:
    for rank in range(4):
        assert held_activations(Schedule("1f1b", 4, 1, 8), rank) == ((0, (4 - rank,)),)
    assert held_activations(Schedule("1f1b", 4, 1, 2), 0) == ((0, (2,)),)


@pytest.mark.parametrize("schedule", [Schedule("interleaved", 4, 3, 64), Schedule("zbv", 4, 2, 64),
                                      Schedule("interleaved-zero-bubble", 4, 2, 48, True)])
def test_a_long_step_holds_what_its_first_rounds_hold(schedule: Schedule) -> None:
    for rank in range(4):
        held: Counter[int] = Counter()
        most = 0
        for kind, chunk, _ in schedule.passes(rank):
            held[chunk] += 1 if kind == "forward" else -1
            most = max(most, held.total())
        assert most == max(sum(counts) for _, counts in held_activations(schedule, rank))
        assert not +held
