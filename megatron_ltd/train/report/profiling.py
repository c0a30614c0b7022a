"""--profile: a torch profiler trace of a few steps after warm-up, one file per process."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from megatron_ltd.config import LoggingConfig

FIRST_STEP, STEPS = 10, 3


class StepProfiler:
    """Counts steps and writes the trace after the last profiled one; does nothing without --profile.

    Args:
        rank: names the file, such as `trace.rank0.json` next to the metrics file; open it in Perfetto.
    """

    def __init__(self, config: LoggingConfig, rank: int):
        self._profile: profile | None = None
        if not config.profile:
            return
        folder = Path(config.metrics_file).parent if config.metrics_file is not None else Path()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile = profile(
            activities=activities, schedule=schedule(wait=FIRST_STEP - 2, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"trace.rank{rank}.json")))
        self._profile.start()

    def step(self) -> None:
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()
