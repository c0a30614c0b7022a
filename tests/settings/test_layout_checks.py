"""Accepted layouts are those that exist, and accepted microbatch counts are those that torch's schedules take."""

import itertools
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as engine

from megatron_ltd.config.run import RunConfig
from megatron_ltd.settings.checks.all import violations
from megatron_ltd.settings.checks.layout import needed_microbatches
from tests.runnable_settings import with_settings

SCHEDULES = {"1f1b": (engine.Schedule1F1B, (1,)), "interleaved": (engine.ScheduleInterleaved1F1B, (1, 2, 3)),
             "interleaved-zero-bubble": (engine.ScheduleInterleavedZeroBubble, (1, 2, 3)),
             "zbv": (engine.ScheduleZBVZeroBubble, (2,))}


class StageOnPaper:
    """As much of a pipeline stage as a schedule needs in order to plan, without processes."""

    def __init__(self, index: int, stages: int, ranks: int):
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, ranks, 0
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.has_backward, self.submod, self.device = True, torch.nn.Identity(), torch.device("cpu")
        self.stage_index_to_group_rank = {stage: stage % ranks for stage in range(stages)}


def engine_takes(schedule: str, pp: int, chunks: int, microbatches: int) -> bool:
    """Whether torch plans the schedule, communication included, rather than raise."""
    kind: Any = SCHEDULES[schedule][0]
    held = [0, 2 * pp - 1] if schedule == "zbv" else [chunk * pp for chunk in range(chunks)]
    stages = [StageOnPaper(index, pp * chunks, pp) for index in held]
    try:
        kind(stages[0] if schedule == "1f1b" else stages, microbatches, loss_fn=lambda output, target: output)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_accepted_microbatch_counts_are_those_that_torch_plans(schedule: str) -> None:
    for pp, chunks in itertools.product((2, 3, 4), SCHEDULES[schedule][1]):
        for microbatches in range(1, 14):
            accepted = needed_microbatches(schedule, pp, microbatches) == microbatches
            assert accepted == engine_takes(schedule, pp, chunks, microbatches), (pp, chunks, microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_number_of_microbatches_that_is_proposed_is_the_next_one_that_works(schedule: str) -> None:
    for pp, microbatches in itertools.product(range(1, 9), range(1, 40)):
        proposed = needed_microbatches(schedule, pp, microbatches)
        assert proposed >= microbatches
        assert needed_microbatches(schedule, pp, proposed) == proposed
        assert all(needed_microbatches(schedule, pp, count) == proposed for count in range(microbatches, proposed))


def fits(config: RunConfig, processes: int) -> bool:
    """The rules of the layouts, written out directly, for uniform splits and a constant batch."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if processes % (tp * pp):
        return False
    dp = processes // tp // pp
    assert training.global_batch_size is not None
    microbatches, rest = divmod(training.global_batch_size, training.micro_batch_size * dp)
    chunks = {"1f1b": 1, "zbv": 2}.get(parallel.pipeline_schedule, 0)
    if chunks == 0:
        assert parallel.num_layers_per_virtual_pipeline_stage is not None
        chunks, uneven = divmod(model.num_layers, pp * parallel.num_layers_per_virtual_pipeline_stage)
        if uneven and pp > 1:
            return False
    shares = [model.num_attention_heads, model.query_groups, model.ffn, model.padded_vocab_size]
    shares += [model.seq_length] if parallel.sequence_parallel else []
    return not rest and not any(share % tp for share in shares) and (
        pp == 1 or (1 <= chunks and pp * chunks <= model.num_layers
                    and engine_takes(parallel.pipeline_schedule, pp, chunks, microbatches)))


def test_on_a_grid_of_layouts_exactly_those_that_fit_are_accepted() -> None:
    accepted = 0
    grid = itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 6, 8), (1, 4), (False, True), SCHEDULES, (4, 12), (5, 8))
    for tp, pp, processes, micro, sequence_parallel, schedule, batch, layers in grid:
        interleaved = schedule.startswith("interleaved") and pp > 1
        config = with_settings(
            random_ltd=False, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
            pipeline_schedule=schedule,
            micro_batch_size=micro, global_batch_size=batch, sequence_parallel=sequence_parallel, num_layers=layers,
            make_vocab_size_divisible_by=4, num_layers_per_virtual_pipeline_stage=2 if interleaved else None)
        expected = fits(with_settings(config, num_layers_per_virtual_pipeline_stage=2), processes)
        assert (violations(config, processes) == []) == expected, config
        accepted += expected
    assert accepted > 100
