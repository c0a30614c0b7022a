"""Which layers a pipeline stage holds, and which process holds a stage."""

ZERO_BUBBLE = ("interleaved-zero-bubble", "zbv")
"""Schedules that split the backward pass into one for inputs and one for weights."""


def uniform_split(layers: int, stages: int) -> list[int]:
    """Layers of each stage, equal up to one. The middle stages take the remainder, since the first stage also has the
    embedding and the last the head."""
    base, surplus = divmod(layers, stages)
    counts = [base] * stages
    middle_first = sorted(range(stages), key=lambda stage: (abs(2 * stage - (stages - 1)), stage))
    for stage in middle_first[:surplus]:
        counts[stage] += 1
    return counts


def stage_spans(counts: list[int]) -> list[tuple[int, int]]:
    """First layer and end of each stage, in order of depth."""
    spans, first = [], 0
    for count in counts:
        spans.append((first, first + count))
        first += count
    return spans


def stages_of_rank(schedule: str, pp_rank: int, pp_size: int, chunks: int) -> list[int]:
    """Global stage ids that a process holds, in order of depth.

    Chunks are assigned in rounds; `zbv` reverses the second round, so that the first process also holds the last stage
    (a V, https://arxiv.org/abs/2401.10241, section 6).
    """
    if schedule == "zbv":
        return [pp_rank, 2 * pp_size - 1 - pp_rank]
    return [pp_rank + chunk * pp_size for chunk in range(chunks)]
