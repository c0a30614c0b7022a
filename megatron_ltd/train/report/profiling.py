"""--profile: a torch profiler trace of a few steps after warm-up, one file per process, and where it is."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from megatron_ltd.config.files import LoggingConfig
from megatron_ltd.log import Console

FIRST_STEP, STEPS = 10, 3


class StepProfiler:
    """Counts steps and writes the trace after the last profiled one; does nothing without --profile.

    Args:
        rank: names the file, such as `trace.rank0.json` next to the metrics file; open it in Perfetto.
    """

    def __init__(self, config: LoggingConfig, rank: int, console: Console):
        self._profile: profile | None = None
        self._console, self._written = console, False
        if not config.profile:
            return
        self._file = (Path(config.metrics_file or "metrics").parent / f"trace.rank{rank}.json").absolute()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile = profile(
            activities=activities, schedule=schedule(wait=FIRST_STEP - 2, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write)
        self._profile.start()

    def step(self) -> None:
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        if not self._written:
            self._console.warn(f"--profile: no trace, since the run ended before step {FIRST_STEP + STEPS - 1}")

    def _write(self, trace: profile) -> None:
        if trace.step_num < FIRST_STEP + STEPS - 1:  # stopped before
            return
        trace.export_chrome_trace(str(self._file))
        self._written = True
        self._console.line(f"profile: a trace of {STEPS} steps is in {self._file}, one file a process; "
                           "open it in Perfetto (ui.perfetto.dev)")
