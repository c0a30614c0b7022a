"""What `benchmarks/gpu_quarter_hour.sh` measures, a function for each step of its plan; `tiny` shapes rehearse it.

A step writes each row with `Bench.write` as soon as it is measured.
"""

import argparse
import functools
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from benchmarks import bert, machine, plain_gpt
from benchmarks.nanogpt import NanoGPT
from benchmarks.ours import OurModel
from benchmarks.shapes import Shape, run_config
from megatron_ltd.config import ModelConfig, RunConfig
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.plan.cluster import peak_tflops
from megatron_ltd.plan.derived import policies, predictions_per_sample
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.train.process.launch import Runtime

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "125m": Shape(12, 768, 12, 1024, 50304, 16),
    "125m, vocabulary 50257": Shape(12, 768, 12, 1024, 50257, 16),
    "350m": Shape(24, 1024, 16, 2048, 50304, 8),
    "1.3b": Shape(24, 2048, 16, 2048, 50304, 8),
}
TINY = Shape(4, 64, 2, 64, 256, 2)
SMALL = Shape(4, 128, 4, 128, 1000, 4)  # for losses that a CPU computes too
LLAMA = {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32,
         "num_query_groups": 8, "vocab_size": 32000}
TINY_LLAMA = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 256}
VIT = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "img_h": 224, "img_w": 224, "patch_dim": 16,
       "num_channels": 3, "num_classes": 1000, "seq_length": 197}
TINY_VIT = VIT | {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 2, "img_h": 32, "img_w": 32,
                  "seq_length": 5}


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
        """Times the rows `dense`, `kept 1/n` and `oracle 1/n` of one model in turn."""
        ours = OurModel(config, self.runtime, batches=batches, on_device=True)
        steps = {row: _step_of(ours, row) for row in rows}
        first = {row: self.seconds(step) for row, step in steps.items()}
        seconds: dict[str, list[float]] = {row: [] for row in rows}
        memory = {}
        for number in range(1, 2) if self.tiny else range(rounds + 1):
            for row, step in steps.items():
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                taken = self.seconds(step)
                if number:  # the first round warms up
                    seconds[row].append(taken)
                    memory[row] = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else None
        whole = step_flops(config, policies(config).whole)
        for row in rows:
            flops = step_flops(config, policies(config).keeping(_kept(config, row)))
            found = self.rates(config, flops, seconds[row])
            if row != "dense":
                theory, saved = 1 - flops / whole, 1 - _ratio(seconds[row], seconds["dense"])
                found |= {"flops_saved": theory, "time_saved": saved, "realised": saved / theory}
            oracle = row.replace("kept", "oracle")
            if oracle != row and oracle in seconds:
                found["of_oracle"] = _ratio(seconds[row], seconds[oracle])
            self.write(f"{name}, {row}", first_s=first[row], peak_mb=memory[row], **found)
        del ours, steps
        self.free()

    def rates(self, config: RunConfig, sample_flops: int, seconds: list[float]) -> dict[str, Any]:
        """Times, TFLOP/s and, on a GPU of known peak, MFU of a step."""
        median, samples = statistics.median(seconds), config.training.micro_batch_size
        tflops = sample_flops * samples / median / 1e12
        peak = peak_tflops(torch.cuda.get_device_name()) if self.cuda else None
        return {"median_ms": 1e3 * median, "min_ms": 1e3 * min(seconds), "max_ms": 1e3 * max(seconds),
                "rounds": len(seconds), "tflops": tflops, "mfu": tflops / peak if peak else None,
                "tokens_per_s": samples * config.model.seq_length / median}


def _step_of(ours: OurModel, row: str) -> Callable[[], float]:
    kept = _kept(ours.config, row)
    return (lambda: ours.oracle_step(kept)) if row.startswith("oracle") else (lambda: ours.step(kept))


def _kept(config: RunConfig, row: str) -> int:
    return config.model.seq_length // int(row[-1]) if row[-1].isdigit() else config.model.seq_length


def _ratio(seconds: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def machine_facts(bench: Bench) -> None:
    """Versions, compilers, the speed of large products, and the attention kernels."""
    found = {name: shutil.which(name) for name in ("cc", "gcc", "nvcc", "ptxas")}
    bench.write("machine", where=machine.describe(bench.runtime.device.type), python=sys.version.split()[0],
                cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), compilers=found,
                memory_mb=torch.cuda.get_device_properties(0).total_memory / 2**20 if bench.cuda else None)
    device = bench.runtime.device
    for size in (64,) if bench.tiny else (2048, 4096, 8192):
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        seconds = bench.average(lambda a=a: a @ a, 30)
        bench.write(f"product of {size}", tflops=2 * size**3 / seconds / 1e12)
    for tokens in (64, 16) if bench.tiny else (2048, 512):
        query = torch.randn(8, 16, tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        with torch.profiler.profile() as profile:
            F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
            bench.wait()
        names = [event.key for event in profile.key_averages() if "attention" in event.key or "fmha" in event.key
                 or "flash" in event.key]
        bench.write(f"attention of {tokens} tokens", kernels=names)


def gpt_350m(bench: Bench) -> None:
    """350M, not compiled."""
    bench.train("350m", bench.config(bench.shape("350m")),
                ("dense", "kept 1/2", "oracle 1/2", "kept 1/4", "oracle 1/4"))


def gpt_1b(bench: Bench) -> None:
    """1.3B, not compiled."""
    bench.train("1.3b", bench.config(bench.shape("1.3b")), ("dense", "kept 1/2", "kept 1/4", "oracle 1/4"), rounds=5)


def vocabularies(bench: Bench) -> None:
    """125M with a vocabulary that is a multiple of 128, and GPT-2's."""
    for name in ("125m", "125m, vocabulary 50257"):
        bench.train(name, bench.config(bench.shape(name)), ("dense", "kept 1/4"))


def parity(bench: Bench) -> None:
    """The losses of the device against those of its CPU, at changing kept lengths."""
    llama = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
             "disable_bias_linear": True, "group_query_attention": True, "num_query_groups": 2}
    shape = TINY if bench.tiny else SMALL
    for name, model in (("gpt", {}), ("llama", llama)):
        config = run_config(shape, precision="fp32", device=bench.runtime.device.type)
        config = replace(config, model=replace(config.model, **model))
        expected = _losses(config, _on_cpu(bench.runtime))
        for precision in ("fp32", "bf16"):
            training = replace(config.training, bf16=precision == "bf16")
            found = _losses(replace(config, training=training), bench.runtime)
            error = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
            bench.write(f"{name} in {precision} against the CPU in fp32", largest_relative_error=error)
    if not bench.tiny:  # without the suite's own conftest.py and settings, which need packages that may be missing
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir=.", "-p",
                               "no:cacheprovider", "--confcutdir=tests/gpu", "--import-mode=importlib",
                               "tests/gpu/test_precision.py", "tests/gpu/test_token_drop.py"],
                              cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        bench.write("tests/gpu", code=done.returncode, said=done.stdout[-3000:] + done.stderr[-1000:])


def _losses(config: RunConfig, runtime: Runtime) -> list[float]:
    ours, full = OurModel(config, runtime), config.model.seq_length
    return [ours.step(kept) for kept in (full, full // 2, full // 4, full // 2, full)]


def _on_cpu(runtime: Runtime) -> Runtime:
    mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(minutes=1))
    return replace(runtime, device=torch.device("cpu"), mesh=mesh)


def compiled_350m(bench: Bench) -> None:
    """350M, compiled."""
    _compiled(bench, "350m", ("dense", "kept 1/4"))


def compiled_1b(bench: Bench) -> None:
    """1.3B, compiled."""
    _compiled(bench, "1.3b", ("dense", "kept 1/4"))


def _compiled(bench: Bench, name: str, rows: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    counters.clear()
    bench.train(f"{name}, compiled", bench.config(bench.shape(name), compiled=True), rows, rounds=6)
    bench.write(f"{name}, compiled, graphs", graphs=counters["stats"]["unique_graphs"],
                breaks=dict(counters["graph_break"]))


def traces(bench: Bench) -> None:
    """Where the time of a dense and of a dropped step goes: kernels, a trace to look at, and the parts of a step."""
    ours = OurModel(bench.config(bench.shape("350m")), bench.runtime, on_device=True)
    full = ours.config.model.seq_length
    for row, kept in (("dense", full), ("kept 1/4", full // 4)):
        ours.step(kept)
        with torch.profiler.profile() as profile:
            ours.step(kept)
            bench.wait()
        name = row.replace(" ", "_").replace("/", "_of_")
        profile.export_chrome_trace(str(bench.out / f"trace_{name}.json.gz"))
        order = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
        (bench.out / f"kernels_{name}.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=40))
        waits = sum(event.count for event in profile.key_averages() if "_local_scalar_dense" in event.key)
        bench.write(f"350m, {row}", parts_ms={part: 1e3 * seconds for part, seconds in ours.timed_parts(kept).items()},
                    host_waits=waits)
    del ours
    bench.free()


def growing_length(bench: Bench) -> None:
    """350M compiled, k growing in eight strides: graphs, the slowest step after warm-up, memory."""
    torch._dynamo.reset()
    counters.clear()
    ours = OurModel(bench.config(bench.shape("350m"), compiled=True), bench.runtime, on_device=True)
    for stride in range(1, 9):
        step = functools.partial(ours.step, ours.config.model.seq_length * stride // 8)
        of_stride = [bench.seconds(step) for _ in range(2 if bench.tiny else 25)]
        bench.write(f"350m, kept {stride}/8", first_s=of_stride[0], median_ms=1e3 * statistics.median(of_stride),
                    worst_of_median=max(of_stride[1:]) / statistics.median(of_stride))
    bench.write("350m, growing length", graphs=counters["stats"]["unique_graphs"],
                reserved_mb=torch.cuda.memory_reserved() / 2**20 if bench.cuda else None,
                allocated_mb=torch.cuda.memory_allocated() / 2**20 if bench.cuda else None)
    del ours, step
    bench.free()


def bert_large(bench: Bench) -> None:
    """BERT-large without dropout, and with that of its shipped configuration."""
    sizes = (4, 64, 64, 256, 2) if bench.tiny else (24, 1024, 512, 30522, 32)
    names = ("layers", "hidden", "sequence", "vocabulary", "samples")
    arguments = argparse.Namespace(**dict(zip(names, sizes, strict=True)))
    for probability in (0.0, 0.1):
        config = bert.run_config(arguments, "random")
        config = replace(config, training=replace(config.training, bf16=True), model=replace(
            config.model, hidden_dropout=probability, attention_dropout=probability))
        predictions = predictions_per_sample(config)
        assert predictions is not None
        bench.train(f"bert-large, dropout {probability}", config, ("dense", "kept 1/2"), rounds=5,
                    batches=[[bert.random_batch(arguments, predictions)]])


def against_plain(bench: Bench) -> None:
    """Compiled steps of ours and of a plain GPT in turn."""
    for name in ("125m", "350m"):
        torch._dynamo.reset()
        shape = bench.shape(name)
        plain = NanoGPT(plain_gpt, shape, precision="bf16", device=bench.runtime.device, compiled=True)
        ours = OurModel(bench.config(shape, compiled=True), bench.runtime, on_device=True)
        rows = {"plain": plain.step, "dense": lambda ours=ours: ours.step(ours.config.model.seq_length)}
        for step in rows.values():
            step()
        seconds: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(1 if bench.tiny else 10):
            for row, step in rows.items():
                seconds[row].append(bench.seconds(step))
        flops = step_flops(ours.config, policies(ours.config).whole)
        for row in rows:
            bench.write(f"{name}, compiled, {row}", of_plain=_ratio(seconds[row], seconds["plain"]),
                        **bench.rates(ours.config, flops, seconds[row]))
        del plain, ours, rows
        bench.free()


def half_precision(bench: Bench) -> None:
    """350M in fp16."""
    bench.train("350m, fp16", bench.config(bench.shape("350m"), precision="fp16"), ("dense", "kept 1/4"), rounds=5)


def llama(bench: Bench) -> None:
    """The shape of Llama 3.2 1B: grouped queries, rotary positions, SwiGLU, RMSNorm."""
    shape = bench.shape("1.3b")
    config = bench.config(shape)
    model = replace(config.model, **(TINY_LLAMA if bench.tiny else LLAMA), group_query_attention=True, swiglu=True,
                    position_embedding_type="rope", normalization="RMSNorm", disable_bias_linear=True)
    bench.train("llama", replace(config, model=model), ("dense", "kept 1/2", "kept 1/4"), rounds=5)


def vit_base(bench: Bench) -> None:
    """ViT-B on images of 224 pixels."""
    model = ModelConfig(family="vit", **(TINY_VIT if bench.tiny else VIT))  # type: ignore[arg-type]
    config = bench.config(replace(TINY, samples=2 if bench.tiny else 64))
    config = replace(config, model=model, token_drop=replace(
        config.token_drop, random_ltd_start_length=model.seq_length))
    samples = config.training.micro_batch_size
    assert model.img_h is not None and model.img_w is not None and model.num_classes is not None
    batch = {"tokens": torch.rand(samples, 3, model.img_h, model.img_w), "sample_ids": torch.arange(samples),
             "labels": torch.randint(model.num_classes, (samples, 1)), "loss_mask": torch.ones(samples, 1)}
    bench.train("vit-b", config, ("dense", "kept 1/2"), rounds=5, batches=[[batch]])
