"""The steps of the first call of `benchmarks/gpu_quarter_hour.sh`; `tiny` shapes rehearse them.

A step writes each row with `Bench.write` as soon as it is measured.
"""

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import machine
from benchmarks.gpu.bench import TINY, Bench
from benchmarks.ours import OurModel
from benchmarks.shapes import Shape, run_config
from megatron_ltd.config.run import RunConfig
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.train.process.launch import Runtime

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(4, 128, 4, 128, 1000, 4)  # for losses that a CPU computes too
MOST_ERROR = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative, of a loss; more is no rounding."""


def machine_facts(bench: Bench) -> None:
    """Versions, compilers, the speed of large products, and the attention kernels."""
    found = {name: shutil.which(name) for name in ("cc", "gcc", "nvcc", "ptxas")}
    bench.write("machine", where=machine.describe(bench.runtime.device.type), python=sys.version.split()[0],
                cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), compilers=found,
                python_headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),  # for Triton
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
    """The losses of the device against those of its CPU, at changing kept lengths.

    Raises:
        RuntimeError: they differ by more than rounding, or a test fails; every row is written before.
    """
    problems = []
    llama = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
             "disable_bias_linear": True, "group_query_attention": True, "num_query_groups": 2}
    shape = TINY if bench.tiny else SMALL
    for name, model in (("gpt", {}), ("llama", llama)):
        config = run_config(shape, precision="fp32", device=bench.runtime.device.type)
        config = replace(config, model=replace(config.model, **model))
        expected = _losses(config, _on_cpu(bench.runtime))
        for precision, most in MOST_ERROR.items():
            training = replace(config.training, bf16=precision == "bf16")
            found = _losses(replace(config, training=training), bench.runtime)
            error = float((torch.tensor(found) / torch.tensor(expected) - 1).abs().max())  # NaN if one is
            row = f"{name} in {precision} against the CPU in fp32"
            bench.write(row, largest_relative_error=error)
            if not error <= most:
                problems.append(f"{row}: losses differ by {error}")
    if not bench.tiny:  # without the suite's own conftest.py and settings, which need packages that may be missing
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir=.", "-p",
                               "no:cacheprovider", "--confcutdir=tests/gpu", "--import-mode=importlib",
                               "tests/gpu/test_documents.py", "tests/gpu/test_precision.py",
                               "tests/gpu/test_token_drop.py"],
                              cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        bench.write("tests/gpu", code=done.returncode, said=done.stdout[-3000:] + done.stderr[-1000:])
        if done.returncode:
            problems.append(f"tests/gpu: exit code {done.returncode}")
    if problems:
        raise RuntimeError("; ".join(problems))


def _losses(config: RunConfig, runtime: Runtime) -> list[float]:
    ours, full = OurModel(config, runtime), config.model.seq_length
    return [ours.step(kept) for kept in (full, full // 2, full // 4, full // 2, full)]


def _on_cpu(runtime: Runtime) -> Runtime:
    mesh = build_mesh("cpu", pp=1, dp=1, tp=1, shard_parameters=False, timeout=timedelta(minutes=1))
    return replace(runtime, device=torch.device("cpu"), mesh=mesh)


def compiled_350m(bench: Bench) -> None:
    """350M, compiled."""
    bench.train_compiled("350m", ("dense", "kept 1/4"))
