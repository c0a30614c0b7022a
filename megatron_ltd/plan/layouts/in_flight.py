"""Which microbatches a process holds the activations of, as its pipeline schedule goes on.

The orders are those of torch's schedules (`torch.distributed.pipelining.schedules`). Activations are freed by the
backward pass, or by the pass for the weights where a zero-bubble schedule splits that off.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

ROUNDS = 3
"""After so many rounds of microbatches a schedule repeats itself."""


class Schedule(NamedTuple):
    """A pipeline's order of work.

    Args:
        name: a value of --pipeline-schedule.
        pp: processes of the pipeline.
        chunks: model chunks of each.
        microbatches: of a step.
        splits: the backward pass is split into one for inputs and one for weights.
    """

    name: str
    pp: int
    chunks: int
    microbatches: int
    splits: bool = False

    def passes(self, rank: int) -> Iterator[tuple[str, int, int]]:
        """What a process does, in order: `forward`, or `free` for the pass that frees activations; local number of the
        model chunk; microbatch."""
        count: Counter[tuple[str, int]] = Counter()
        for kind, chunk in self._zbv(rank) if self.name == "zbv" and self.pp > 1 else self._in_turn(rank):
            microbatch = count[kind, chunk]
            count[kind, chunk] += 1
            if microbatch < self.microbatches:  # zbv is filled up with microbatches that do not exist
                yield kind, chunk, microbatch

    def _in_turn(self, rank: int) -> Iterator[tuple[str, int]]:
        """Forward passes first, then forward and backward in turn."""
        chunks, total = self.chunks, self.microbatches * self.chunks
        if self.name == "1f1b" or self.pp == 1:
            per_round, warmup, late = self.microbatches, min(self.microbatches, self.pp - rank) - 1, 0
        else:
            is_zero_bubble = self.name == "interleaved-zero-bubble"
            per_round = self.microbatches // max(1, self.microbatches // self.pp)
            hops = (1 if is_zero_bubble else 2) * (self.pp - 1 - rank)
            warmup = min((chunks - 1) * per_round + hops, total)
            late = rank if is_zero_bubble and self.splits else 0
        waiting: list[int] = []
        for step in range(warmup + total):
            if step < total:
                yield "forward", step // per_round % chunks
            if step >= warmup:
                waiting.append(chunks - 1 - (step - warmup) // per_round % chunks)
            if len(waiting) > late:
                yield "free", waiting.pop(0)
        yield from (("free", chunk) for chunk in waiting)

    def _zbv(self, rank: int) -> Iterator[tuple[str, int]]:
        """A V of two chunks (https://arxiv.org/abs/2401.10241, section 6)."""
        pp, total = self.pp, max(2 * self.pp - 1, self.microbatches)
        first = 2 * (pp - rank) - 1
        yield from [("forward", 0)] * first
        yield from [("forward", 1), ("forward", 0)] * rank
        yield from [("forward", 1), ("free", 1)] * (pp - rank)
        forward = [first + rank, pp]
        while forward[1] < forward[0] or forward[0] < total:
            if forward[0] < total:
                yield "forward", 0
                forward[0] += 1
            yield from (("free", 0), ("forward", 1), ("free", 1))
            forward[1] += 1
        # The inputs' passes of the cool-down come first; those for the weights, which free, are last if they are split.
        if self.splits:
            yield from [("free", 0)] * (pp - rank)
            yield from [("free", 1)] * rank + [("free", 0)] * rank
        else:
            yield from [("free", 0), ("free", 1)] * rank
            yield from [("free", 0)] * (pp - rank)


@lru_cache(maxsize=4096)
def held_activations(schedule: Schedule, rank: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The distinct states that may take the most memory: the chunk whose forward pass came last, and how many
    microbatches of each chunk are held then, that one included. States that hold less of everything are left out."""
    per_round = schedule.microbatches // max(1, schedule.microbatches // schedule.pp)
    short = schedule._replace(microbatches=min(schedule.microbatches, ROUNDS * max(per_round, schedule.pp)))
    held, seen = [0] * schedule.chunks, set()
    for kind, chunk, _ in short.passes(rank):
        held[chunk] += 1 if kind == "forward" else -1
        if kind == "forward":
            seen.add((chunk, tuple(held)))
    return tuple(sorted((chunk, counts) for chunk, counts in seen if not any(
        other != counts and last == chunk and all(a >= b for a, b in zip(other, counts, strict=True))
        for last, other in seen)))
