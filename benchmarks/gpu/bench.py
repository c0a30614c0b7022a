"""What the steps of `benchmarks/gpu_quarter_hour.sh` share: shapes, rows, and the timing of one model's steps."""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.ours import OurModel
from benchmarks.shapes import Shape, run_config
from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.plan.layouts.cluster import peak_tflops
from megatron_ltd.train.process.launch import Runtime

SHAPES = {
    "125m": Shape(12, 768, 12, 1024, 50304, 16),
    "125m, vocabulary 50257": Shape(12, 768, 12, 1024, 50257, 16),
    "350m": Shape(24, 1024, 16, 2048, 50304, 8),
    "1.3b": Shape(24, 2048, 16, 2048, 50304, 8),
}
TINY = Shape(4, 64, 2, 64, 256, 2)


@dataclass
class Bench:
    """Where a step runs, and where its rows go."""

    runtime: Runtime
    out: Path
    tiny: bool
    step: str = ""

    @property
    def cuda(self) -> bool:
        return self.runtime.device.type == "cuda"

    def shape(self, name: str) -> Shape:
        return TINY if self.tiny else SHAPES[name]

    def write(self, row: str, **found: Any) -> None:
        """Appends a line to results.jsonl, and shows it."""
        line = json.dumps({"step": self.step, "row": row, **found})
        with (self.out / "results.jsonl").open("a") as stream:
            stream.write(line + "\n")
        print(line, flush=True)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def average(self, call: Callable[[], Any], calls: int = 20) -> float:
        """Seconds of one call among many; on a GPU the launches of the next overlap it."""
        calls = 1 if self.tiny else calls
        call()
        return self.seconds(lambda: [call() for _ in range(calls)]) / calls

    def config(self, shape: Shape, precision: str = "bf16", compiled: bool = False) -> RunConfig:
        config = run_config(shape, precision=precision, device=self.runtime.device.type, compiled=compiled)
        return replace(config, training=replace(config.training, fp16=True)) if precision == "fp16" else config

    def train(self, name: str, config: RunConfig, rows: tuple[str, ...], *, rounds: int = 8,
              batches: list[list[dict[str, torch.Tensor]]] | None = None) -> None:
        """Times the rows `dense`, `kept 1/n` and `oracle 1/n` of one model in turn.

        Raises:
            RuntimeError: a loss is not finite; every row is written before.
        """
        ours = OurModel(config, self.runtime, batches=batches, on_device=True)
        steps = {row: step_of(ours, row) for row in rows}
        first = {row: self.seconds(step) for row, step in steps.items()}
        seconds: dict[str, list[float]] = {row: [] for row in rows}
        memory: dict[str, float | None] = {}
        losses: dict[str, float] = {}
        for number in range(1, 2) if self.tiny else range(rounds + 1):
            for row, step in steps.items():
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                taken = self.seconds(lambda row=row, step=step: losses.update({row: step()}))
                if number:  # the first round warms up
                    seconds[row].append(taken)
                    memory[row] = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else None
        whole = step_flops(config, policies(config).whole)
        for row in rows:
            flops = step_flops(config, policies(config).keeping(kept_tokens(config, row)))
            found = self.rates(config, flops, seconds[row])
            if row != "dense":
                theory, saved = 1 - flops / whole, 1 - ratio(seconds[row], seconds["dense"])
                found |= {"flops_saved": theory, "time_saved": saved, "realised": saved / theory}
            oracle = row.replace("kept", "oracle")
            if oracle != row and oracle in seconds:
                found["of_oracle"] = ratio(seconds[row], seconds[oracle])
            self.write(f"{name}, {row}", first_s=first[row], peak_mb=memory[row], loss=losses[row], **found)
        del ours, steps
        self.free()
        if not all(map(math.isfinite, losses.values())):
            raise RuntimeError(f"{name}: losses {losses}")

    def train_compiled(self, name: str, rows: tuple[str, ...]) -> None:
        """The same of the compiled shape of this name, and its graphs."""
        torch._dynamo.reset()
        counters.clear()
        self.train(f"{name}, compiled", self.config(self.shape(name), compiled=True), rows, rounds=6)
        self.write(f"{name}, compiled, graphs", graphs=counters["stats"]["unique_graphs"],
                   breaks=dict(counters["graph_break"]))

    def rates(self, config: RunConfig, sample_flops: int, seconds: list[float]) -> dict[str, Any]:
        """Times, TFLOP/s and, on a GPU of known peak, MFU of a step."""
        median, samples = statistics.median(seconds), config.training.micro_batch_size
        tflops = sample_flops * samples / median / 1e12
        peak = peak_tflops(torch.cuda.get_device_name()) if self.cuda else None
        return {"median_ms": 1e3 * median, "min_ms": 1e3 * min(seconds), "max_ms": 1e3 * max(seconds),
                "rounds": len(seconds), "tflops": tflops, "mfu": tflops / peak if peak else None,
                "tokens_per_s": samples * config.model.seq_length / median}


def step_of(ours: OurModel, row: str) -> Callable[[], float]:
    kept = kept_tokens(ours.config, row)
    return (lambda: ours.oracle_step(kept)) if row.startswith("oracle") else (lambda: ours.step(kept))


def kept_tokens(config: RunConfig, row: str) -> int:
    return config.model.seq_length // int(row[-1]) if row[-1].isdigit() else config.model.seq_length


def ratio(seconds: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))
