"""Steps that are skipped, tried again, or taken back: the fault is caused, and the curve after it is one that another
run shows to be right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ltd.model.attention.context import ContextMaker
from megatron_ltd.model.stack import Stack
from megatron_ltd.train.faults.record import FaultRecord
from megatron_ltd.train.faults.spikes import SpikeWatch, suspects, z_score
from tests.gloo import launch_ranks
from tests.train.runs import TINY, Corpus, Ending, Settings, curve, pretrain, read_lines, saved_tensors

BATCH, STEPS = 4, 8
SHORT: dict[str, Any] = {**TINY, "num_layers": 4, "hidden_size": 16, "random_ltd_steps": 5, "global_batch_size": BATCH,
                         "train_iters": STEPS, "eval_iters": 0, "lr_warmup_iters": 1}
WITHOUT_LTD = {name: None for name in TINY if name.startswith("random_ltd")}
PP2 = {"pipeline_model_parallel_size": 2}


@dataclass(frozen=True)
class Fault:
    """What a forward pass of training multiplies the hidden states by.

    Args:
        steps: in passes over samples of these.
        rank: on this process; None: wherever the samples are.
        times: that it happens in each step; None: always.
    """

    steps: Sequence[int]
    rank: int | None = None
    times: int | None = None
    factor: float = math.nan


def pretrain_with_fault(rank: int, world_size: int, init_method: str, settings: Settings, fault: Fault) -> Ending:
    whole, left = Stack.forward, dict.fromkeys(fault.steps, -1 if fault.times is None else fault.times)

    def forward(stack: Stack, stream: torch.Tensor, contexts: ContextMaker, *args: Any) -> torch.Tensor:
        step = int(contexts.batch.sample_ids[0]) // BATCH + 1
        if stack.training and "0" in stack.blocks and fault.rank in (None, rank) and left.get(step, 0):
            left[step] -= 1
            stream = stream * fault.factor
        return whole(stack, stream, contexts, *args)

    with mock.patch.object(Stack, "forward", forward):
        return pretrain(rank, world_size, init_method, settings)


def finished(folder: Path, corpus: Corpus, fault: Fault, world_size: int = 1, code: int = 0,
             **settings: Any) -> tuple[list[dict[str, Any]], list[Ending]]:
    """The curve of a run with checkpoints, and how its ranks ended."""
    folder.mkdir(exist_ok=True)
    path, saved = folder / "metrics.jsonl", str(folder / "checkpoints")
    given = {**SHORT, **corpus.settings, "save": saved, "load": saved, "metrics_file": str(path), **settings}
    if world_size == 1:
        endings = [pretrain_with_fault(0, 1, "", given, fault)]
    else:
        endings = launch_ranks(pretrain_with_fault, world_size, given, fault, timeout=120)
    assert {ending.code for ending in endings} == {code}, "\n".join(ending.said for ending in endings)
    return curve(read_lines(path)), endings


NO_FAULT = Fault(())


def test_a_skipped_step_equals_one_whose_update_is_not_finite(corpus: Corpus, tmp_path: Path) -> None:
    """Neither changes anything, and the steps after them are the same; a step that is skipped reads no samples."""
    skipped, [ending] = finished(tmp_path / "skipped", corpus, NO_FAULT, iterations_to_skip=(3,), save=None, load=None)
    assert [line["step"] for line in skipped] == [1, 2, 3, 5, 6, 7, 8]
    assert {sample // BATCH + 1 for _, sample in ending.kept} == {1, 2, 3, 5}  # from step 6 on all tokens are kept
    for world_size, layout in ((1, {}), (2, PP2)):
        folder = tmp_path / f"{world_size}{len(layout)}"
        poisoned, _ = finished(folder, corpus, Fault([4]), world_size, skip_nonfinite=1, save=None, load=None, **layout)
        assert poisoned[3]["skipped"] is True and math.isnan(poisoned[3]["lm_loss"])
        for line, wanted in zip(poisoned[:3] + poisoned[4:], skipped, strict=True):
            assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], rel=1e-5 if world_size > 1 else 0, abs=0)
            for name in ("step", "consumed_samples", "consumed_layer_tokens", "learning_rate", "kept_length"):
                assert line[name] == wanted[name]


def test_more_bad_updates_in_a_row_than_allowed_end_the_run_also_across_a_restart(
    corpus: Corpus, tmp_path: Path,
) -> None:
    """Steps 3 and 4 are within the limit, 6 to 8 are not; the run is stopped between them."""
    fault, settings = Fault([3, 4, 6, 7, 8]), {"skip_nonfinite": 2}
    finished(tmp_path, corpus, fault, code=11, exit_interval=7, **settings)
    _, [ending] = finished(tmp_path, corpus, fault, code=30, **settings)
    assert "step 8: loss nan" in ending.said and "--iterations-to-skip 7" in ending.said
    assert "it is not finite when it is computed again. Continue from the checkpoint of step 7" in ending.said


def test_a_fault_that_passes_is_taken_back_and_the_second_one_names_the_machine(corpus: Corpus, tmp_path: Path) -> None:
    sound, _ = finished(tmp_path / "sound", corpus, NO_FAULT, save_interval=2)
    found, [ending] = finished(tmp_path / "once", corpus, Fault([4], times=1), save_interval=2)
    assert found == sound and "returns to the checkpoint of step 2" in ending.said
    tensors, wanted = (saved_tensors(tmp_path / name / "checkpoints", STEPS) for name in ("once", "sound"))
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    twice, endings = finished(tmp_path / "twice", corpus, Fault([4, 6], rank=1, times=1), 2, code=50, save_interval=2)
    first, second = (line for line in endings[0].said.splitlines() if "fault of rank 1 on" in line)
    assert "step 4: loss nan" in first and "returns to the checkpoint of step 2" in first
    assert "step 6: loss nan" in second and "for the second time: replace this machine" in second
    assert [line["lm_loss"] for line in twice[:5]] == pytest.approx([line["lm_loss"] for line in sound[:5]], rel=1e-5)


def test_a_process_that_fails_whatever_its_samples_are_is_named(corpus: Corpus, tmp_path: Path) -> None:
    _, endings = finished(tmp_path, corpus, Fault(range(3, 9), rank=1), 2, code=50)
    assert "Rank 1 on" in endings[0].said and "is not finite with other samples either" in endings[0].said


SPIKE: dict[str, Any] = {**WITHOUT_LTD, "on_loss_spike": "skip", "loss_spike_window": 8, "save_interval": 3, "lr": 3e-2,
                         "loss_spike_threshold": 3.0, "train_iters": 12}


def test_the_samples_of_a_spike_are_skipped_alike_after_a_restart_and_on_another_layout(
    corpus: Corpus, tmp_path: Path,
) -> None:
    jump = Fault([8], factor=-1.0)
    found, [ending] = finished(tmp_path / "whole", corpus, jump, **SPIKE)
    assert "returns to the checkpoint of step 6 and skips the samples of steps 7 to 8" in ending.said
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12]
    skipped, _ = finished(tmp_path / "skipped", corpus, NO_FAULT, iterations_to_skip=(6, 7), **SPIKE)
    assert found == skipped
    parts = tmp_path / "parts"
    finished(parts, corpus, jump, code=11, exit_interval=10, **SPIKE)
    assert finished(parts, corpus, jump, **SPIKE)[0] == found
    sharded = {"data_parallel_sharding_strategy": "optim_grads_params"}
    moved, _ = finished(tmp_path / "moved", corpus, jump, 2, **SPIKE, **sharded)
    assert [line["step"] for line in moved] == [line["step"] for line in found]
    for line, wanted in zip(moved, found, strict=True):
        assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], rel=1e-5)


def test_a_spike_is_told_and_the_run_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    found, [ending] = finished(tmp_path, corpus, Fault([8], factor=-1.0), **{**SPIKE, "on_loss_spike": "warn"})
    assert ending.said.count("step 8: loss") == 1 and "returns" not in ending.said
    scores = {line["step"]: line.get("loss_z_score") for line in found}
    assert scores[1] is scores[2] is None and scores[8] is not None and scores[8] > 3.0
    assert all(score < 3.0 for step, score in scores.items() if score is not None and step != 8)


def test_scores_are_robust_and_start_anew_with_each_phase() -> None:
    losses = [3.0, 3.1, 2.9, 3.05, 2.95, 90.0]
    # The median is (3.0 + 3.05) / 2; distances 0.025, 0.025, 0.075, 0.075, 0.125, 86.975 have the median 0.075.
    assert z_score(losses, 4.0) == pytest.approx((4.0 - 3.025) / (1.4826 * 0.075))
    assert z_score([2.0] * 9, 2.1) == pytest.approx(0.1 / (0.005 * 2.0))
    watch, record, found = SpikeWatch(8, (0, 10)), FaultRecord(), []
    for step in range(1, 16):
        record, score = watch.after(record, step, float(step))
        found.append(score)
    assert [score is None for score in found] == [True] * 2 + [False] * 8 + [True] * 2 + [False] * 3
    assert record == FaultRecord(phase=2, losses=(11.0, 12.0, 13.0, 14.0, 15.0))


def test_each_return_to_a_checkpoint_skips_twice_as_many_steps_before_the_spike() -> None:
    assert [list(suspects(20, 12, rollbacks)) for rollbacks in range(5)] == [
        [19, 20], [18, 19, 20], [16, 17, 18, 19, 20], list(range(13, 21)), list(range(13, 21))]
