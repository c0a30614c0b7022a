"""Runs the steps of one call of `benchmarks/gpu_quarter_hour.sh`; see there.

A step that fails or takes too long is recorded, and the next one runs. Where the process cannot go on (an error of the
GPU, a step that hangs), it ends with exit code 3, and the same command continues with the step after it, once it has
recorded that the process ended in the one before.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from benchmarks.gpu import first, micro, second
from benchmarks.gpu.bench import TINY, Bench
from benchmarks.shapes import run_config
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.exits import leave

CANNOT_GO_ON = 3
_HANGS_SECONDS = 15.0
_PATIENCE = 6
"""How much longer a step of the rehearsal may take: a CPU's compiler is slower than a GPU's."""

PLAN: dict[str, dict[str, tuple[Callable[[Bench], None], int]]] = {
    "first": {
        "machine": (first.machine_facts, 15),
        "350m": (first.gpt_350m, 30),
        "1.3b": (first.gpt_1b, 45),
        "vocabularies": (first.vocabularies, 25),
        "parity": (first.parity, 60),
        "350m compiled": (first.compiled_350m, 75),
    },
    "second": {
        "traces": (second.traces, 45),
        "micro": (micro.micro, 55),
        "1.3b compiled": (second.compiled_1b, 90),
        "growing length": (second.growing_length, 100),
        "bert-large": (second.bert_large, 50),
        "against plain": (second.against_plain, 110),
        "fp16": (second.half_precision, 30),
        "llama": (second.llama, 40),
        "vit-b": (second.vit_base, 30),
    },
}
"""Steps of each call in the order of their worth, with the seconds after which they are ended."""


class TooLongError(Exception):
    """A step reached its limit."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLongError


def run_step(bench: Bench, name: str, work: Callable[[Bench], None], limit: float) -> bool:
    """Runs one step; whether the next one can run in this process."""
    bench.step = name
    bench.write("begins", limit_s=limit)
    started = time.monotonic()
    hangs = threading.Timer(limit + _HANGS_SECONDS, os._exit, (CANNOT_GO_ON,))  # a signal waits while C++ runs
    hangs.daemon = True
    hangs.start()
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, limit)
    problem = None
    try:
        work(bench)
    except TooLongError:
        problem = f"ended after {limit} s"
    except Exception as error:
        problem = "".join(traceback.format_exception(error))[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        bench.free()
        bench.wait()
        usable = True
    except RuntimeError as error:  # of the GPU; it stays
        problem, usable = f"{problem or ''}{error}", False
    hangs.cancel()
    bench.write("ends", seconds=time.monotonic() - started, problem=problem)
    return usable


def begun(bench: Bench) -> set[str]:
    """Steps that were begun in this folder. One of them may have ended its process; that is recorded now."""
    path = bench.out / "results.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = {kind: [row["step"] for row in found if row["row"] == kind] for kind in ("begins", "ends")}
    for bench.step in dict.fromkeys(steps["begins"]):
        if bench.step not in steps["ends"]:
            bench.write("ends", problem="the process ended in it: it hung, crashed or was killed")
    return set(steps["begins"])


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=sorted(PLAN))
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl, traces, tables of kernels")
    parser.add_argument("--seconds", type=float, default=560.0, help="no step begins that could end after so long")
    parser.add_argument("--tiny", action="store_true", help="rehearse with small models")
    parser.add_argument("--eager", action="store_true", help="with --tiny: compile nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available() and not args.tiny:
        print("No GPU: only --tiny can run here.", file=sys.stderr)
        return 2
    if args.eager:
        torch.compiler.set_stance("force_eager")
    started = time.monotonic()
    runtime = launch.start(run_config(
        TINY, precision="bf16", device="cuda" if torch.cuda.is_available() else "cpu"), Launch())
    bench = Bench(runtime, args.out, args.tiny)
    done, usable = begun(bench), True
    try:
        for name, (work, limit) in PLAN[args.call].items():
            if name in done:
                continue
            if time.monotonic() - started > args.seconds - (0 if args.tiny else limit):
                bench.step = name
                bench.write("left out", reason="no time left")
                continue
            usable = run_step(bench, name, work, limit * (_PATIENCE if args.tiny else 1))
            if not usable:
                return CANNOT_GO_ON
    finally:
        if usable:  # with a broken GPU, leaving the process group may fail or hang
            launch.stop()
        torch.compiler.set_stance("default")
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
