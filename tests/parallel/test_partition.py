"""Layers of stages and stages of ranks, by hand and against torch's own placement."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.parallel.partition import stage_spans, stages_of_rank, uniform_split


@pytest.mark.parametrize(("layers", "stages", "expected"), [
    (24, 4, [6, 6, 6, 6]), (8, 1, [8]), (4, 4, [1, 1, 1, 1]), (13, 4, [3, 4, 3, 3]), (14, 4, [3, 4, 4, 3]),
    (15, 4, [4, 4, 4, 3]), (10, 3, [3, 4, 3]), (11, 3, [4, 4, 3]), (6, 5, [1, 1, 2, 1, 1]),
])
def test_surplus_layers_go_to_the_middle(layers: int, stages: int, expected: list[int]) -> None:
    assert uniform_split(layers, stages) == expected


@given(st.integers(1, 32), st.integers(0, 200))
def test_a_split_has_every_layer_once_and_stages_equal_up_to_one(stages: int, extra: int) -> None:
    layers = stages + extra
    counts = uniform_split(layers, stages)
    assert sum(counts) == layers and len(counts) == stages
    assert max(counts) - min(counts) <= 1
    # What is left over lies in one run around the middle: the last stage, which has the head, comes last.
    surplus = [stage for stage, count in enumerate(counts) if count > min(counts)]
    assert surplus == list(range(surplus[0], surplus[0] + len(surplus))) if surplus else True
    if 0 < len(surplus) < stages:
        assert stages - 1 not in surplus


def test_spans_follow_one_another() -> None:
    assert stage_spans([3, 1, 4]) == [(0, 3), (3, 4), (4, 8)]


def test_chunks_are_dealt_in_rounds() -> None:
    assert [stages_of_rank("1f1b", rank, 4, 1) for rank in range(4)] == [[0], [1], [2], [3]]
    for schedule in ("interleaved", "interleaved-zero-bubble"):
        assert [stages_of_rank(schedule, rank, 2, 3) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]


def test_the_second_round_of_a_v_goes_back() -> None:
    assert [stages_of_rank("zbv", rank, 4, 2) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 4), ("zbv", 2)])
def test_every_stage_has_one_owner(schedule: str, chunks: int) -> None:
    owned = [stage for rank in range(3) for stage in stages_of_rank(schedule, rank, 3, chunks)]
    assert sorted(owned) == list(range(3 * chunks))


@pytest.mark.parametrize(("schedule", "chunks", "style"), [("interleaved", 2, "loop"), ("zbv", 2, "v")])
def test_placement_is_the_one_torch_schedules_for(schedule: str, chunks: int, style: str) -> None:
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    for stage, rank in generate_stage_to_rank_mapping(4, 4 * chunks, style=style).items():
        assert stage in stages_of_rank(schedule, rank, 4, chunks)
