"""A trace is of the steps that are promised, and the log says where it is."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ltd.config.files import LoggingConfig
from megatron_ltd.log import Console
from megatron_ltd.train.report.profiling import StepProfiler


def profiled(folder: Path, steps: int) -> None:
    profiler = StepProfiler(LoggingConfig(profile=True, metrics_file=str(folder / "m.jsonl")), 0, Console())
    for step in range(1, steps + 1):
        with torch.profiler.record_function(f"the step {step}"):
            torch.zeros(1)
        profiler.step()
    profiler.close()


def test_steps_10_to_12_are_traced_and_the_log_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiled(tmp_path, 15)
    trace = tmp_path / "trace.rank0.json"
    seen = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "the step" in event["name"]}
    assert seen == {"the step 10", "the step 11", "the step 12"}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"a trace of 3 steps is in {trace}" in said


def test_a_run_that_is_too_short_says_that_there_is_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    profiled(tmp_path, 11)
    assert not (tmp_path / "trace.rank0.json").exists()
    assert "no trace" in capsys.readouterr().err
