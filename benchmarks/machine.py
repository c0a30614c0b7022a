"""What a measurement ran on: processor, versions, the commit of the source."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[1]


def processor(device: str) -> str:
    """Name of the GPU, or of the CPU with the cores this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, marked where sources differ from it; `unknown` where there is none."""
    found = _git("rev-parse", "--short", "HEAD")
    if found is None:
        return "unknown"
    return found + (" with changes" if _git("status", "--porcelain", "megatron_ltd", "benchmarks", "tools") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe(device: str) -> str:
    """One line for the head of a table."""
    return (f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}, "
            f"{datetime.now(UTC):%Y-%m-%d}")
