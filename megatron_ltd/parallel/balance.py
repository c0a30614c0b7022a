"""Assigns layers to pipeline stages so that the busiest process has as little work as possible.

Stages are contiguous and hold at least one layer; a process may hold several of them (`partition.stages_of_rank`).
With one stage per process the best split is found exactly, by dynamic programming. With several, all splits are tried
if they are few; otherwise a local search moves layers between stages, from several starting points, until no move
helps.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from megatron_ltd.parallel.partition import stages_of_rank, uniform_split

_FEW_SPLITS = 5000


def rank_costs(split: Sequence[int], costs: Sequence[int], last_cost: int, schedule: str, pp_size: int) -> list[int]:
    """Work of each process.

    Args:
        split: layers of each stage, in order of depth.
        costs: of each layer.
        last_cost: of the head, which the last stage has in addition to its layers.
    """
    stage_costs = stage_sums(split, costs, last_cost)
    chunks = len(split) // pp_size
    return [sum(stage_costs[stage] for stage in stages_of_rank(schedule, rank, pp_size, chunks))
            for rank in range(pp_size)]


def stage_sums(split: Sequence[int], costs: Sequence[int], last_cost: int) -> list[int]:
    """Work of each stage."""
    ends = list(itertools.accumulate(split))
    sums = [sum(costs[end - count:end]) for count, end in zip(split, ends, strict=True)]
    sums[-1] += last_cost
    return sums


def balanced_split(costs: Sequence[int], last_cost: int, schedule: str, pp_size: int, chunks: int) -> list[int]:
    """Layers of each stage, in order of depth, such that the busiest process has the least work; among such splits, one
    whose other processes are most evenly loaded.

    Args:
        costs: of each layer, at least as many as there are stages.
        last_cost: of the head.
        chunks: stages per process.
    """
    if chunks == 1 or pp_size == 1:
        return _exact(costs, last_cost, pp_size * chunks)
    stages = pp_size * chunks

    def grade(split: Sequence[int]) -> tuple[int, int]:
        return _grade(split, costs, last_cost, schedule, pp_size)

    if math.comb(len(costs) - 1, stages - 1) <= _FEW_SPLITS:
        return min(_all_splits(len(costs), stages), key=grade)
    beginnings = [uniform_split(len(costs), stages), _exact(costs, last_cost, stages), _exact(costs, 0, stages)]
    found = [_improved(beginning, costs, last_cost, schedule, pp_size) for beginning in beginnings]
    return min(found, key=grade)


def _grade(split: Sequence[int], costs: Sequence[int], last_cost: int, schedule: str, pp_size: int) -> tuple[int, int]:
    work = rank_costs(split, costs, last_cost, schedule, pp_size)
    return max(work), sum(cost * cost for cost in work)


def _exact(costs: Sequence[int], last_cost: int, stages: int) -> list[int]:
    """One stage per process: first the smallest possible maximum, then the least sum of squares under that bound."""
    largest = _best(costs, last_cost, stages, None)[-1][len(costs)][0]
    table = _best(costs, last_cost, stages, largest)
    split, end = [], len(costs)
    for row in reversed(table[1:]):
        begin = row[end][1]
        split.append(end - begin)
        end = begin
    return split[::-1]


def _best(costs: Sequence[int], last_cost: int, stages: int, bound: int | None) -> list[dict[int, tuple[int, int]]]:
    """For each number of stages and each number of leading layers in them: (score, first layer of the last of these
    stages). The score is the largest stage or, if a bound on it is given, the sum of squares."""
    sums = [0, *itertools.accumulate(costs)]
    layers = len(costs)
    table: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for stage in range(1, stages + 1):
        ends = range(stage, layers - (stages - stage) + 1) if stage < stages else range(layers, layers + 1)
        row: dict[int, tuple[int, int]] = {}
        for end in ends:
            candidates = []
            for begin, (grade, _) in table[-1].items():
                if begin >= end:
                    continue
                cost = sums[end] - sums[begin] + (last_cost if stage == stages else 0)
                if bound is None:
                    candidates.append((max(grade, cost), begin))
                elif cost <= bound:
                    candidates.append((grade + cost * cost, begin))
            if candidates:
                row[end] = min(candidates)
        table.append(row)
    return table


def _all_splits(layers: int, stages: int) -> Iterator[list[int]]:
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        ends = (0, *cuts, layers)
        yield [end - begin for begin, end in itertools.pairwise(ends)]


def _improved(split: list[int], costs: Sequence[int], last_cost: int, schedule: str, pp_size: int) -> list[int]:
    """Move one layer at a time from any stage to any other, best move first, until no move helps."""
    grade = _grade(split, costs, last_cost, schedule, pp_size)
    while True:
        moves = []
        for giver, taker in itertools.permutations(range(len(split)), 2):
            if split[giver] > 1:
                moved = list(split)
                moved[giver] -= 1
                moved[taker] += 1
                moves.append((_grade(moved, costs, last_cost, schedule, pp_size), moved))
        if not moves or min(moves)[0] >= grade:
            return split
        grade, split = min(moves)
