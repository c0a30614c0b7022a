"""Time whole training steps side by side: ours dense, ours with dropped tokens, the oracle, and nanoGPT.

    python tools/benchmark.py --shape 8x256 --precision fp32 --nanogpt path/to/nanoGPT --rounds 7
    python tools/benchmark.py --shape 12x512 --precision bf16 --layouts --memory --output results.json

A step is forward, backward, clipping and fused AdamW. The rows alternate within each round, and ratios are computed per
round, so that drift of the machine's speed affects all rows alike; medians are printed. `oracle` is the same model with
the middle layers on one contiguous slice of k tokens, without selection, gather or add: a lower bound for the cost of
token dropping.

On a shared machine, `--threads 1 --clock cpu` measures CPU time of the process rather than wall-clock time.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

import torch

from benchmarks import machine
from benchmarks.nanogpt import NanoGPT, load_source
from benchmarks.ours import OurModel
from benchmarks.shapes import SHAPES, Shape, run_config
from benchmarks.together import run_together
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.plan.layouts.cluster import peak_tflops
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.exits import leave
from tools.commands.command_line import add_output, exit_code_of, parser_of

Rows = dict[str, Callable[[], Any]]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8x256",
                        help="layers x width of the model (default: 8x256)")
    parser.add_argument("--samples", type=int, help="samples per step, instead of the shape's")
    parser.add_argument("--sequence", type=int, help="tokens per sample, instead of the shape's")
    parser.add_argument("--rows", default="all", metavar="NAME,...", help="only these rows, such as `dense,kept 1/4`")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--compile", action="store_true", help="compile ours and nanoGPT")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each row (default: 7)")
    parser.add_argument("--threads", type=int, help="threads per process; default: torch's")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="clock for single-process rows")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, to time it too")
    parser.add_argument("--layouts", action="store_true", help="also time two processes, tensor and pipeline parallel")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, each row in a fresh process")
    add_output(parser, type=Path, metavar="FILE", help="write all numbers as JSON")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        parser.error("--clock cpu adds up the time of all threads; it needs --threads 1 and --device cpu")
    return args


def shape_of(args: argparse.Namespace) -> Shape:
    given = {"samples": args.samples, "sequence_tokens": args.sequence}
    return Shape(**vars(SHAPES[args.shape]) | {name: value for name, value in given.items() if value is not None})


def check(args: argparse.Namespace) -> None:
    """Find out before the steps are timed that they cannot be, or that their times cannot be written.

    Raises:
        ConfigError: a number is too small, or the folder of --output is missing.
    """
    # The shortest of the rows keeps a quarter of the tokens, at least one.
    for flag, value, least in (("--samples", args.samples, 1), ("--sequence", args.sequence, 4),
                               ("--rounds", args.rounds, 1), ("--threads", args.threads, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{flag} = {value} must be at least {least}.")
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise ConfigError(f"--output = {args.output} must be a file in an existing folder.")


def row_names(args: argparse.Namespace) -> list[str]:
    """The requested rows, in the order in which they run.

    Raises:
        ConfigError: one of them does not exist.
    """
    names = ["nanoGPT"] * (args.nanogpt is not None) + ["dense", "kept 1/2", "oracle 1/2", "kept 1/4", "oracle 1/4"]
    asked = names if args.rows == "all" else args.rows.split(",")
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise ConfigError(f"--rows = {args.rows}: no row {', '.join(map(repr, unknown))}; choose from "
                          f"{', '.join(names)}{'' if args.nanogpt else ' (nanoGPT needs --nanogpt)'}")
    return [name for name in names if name in asked]


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def build_rows(args: argparse.Namespace, names: list[str]) -> tuple[Rows, OurModel | None]:
    """The steps of these rows, and the model that ours share; None if no row is ours."""
    shape, device = shape_of(args), torch.device(args.device)
    rows: Rows = {}
    if "nanoGPT" in names:
        assert args.nanogpt is not None
        rows["nanoGPT"] = NanoGPT(load_source(args.nanogpt), shape, precision=args.precision, device=device,
                                  compiled=args.compile).step
    if set(names) <= {"nanoGPT"}:
        return rows, None
    config = run_config(shape, precision=args.precision, device=args.device, compiled=args.compile)
    ours = OurModel(config, launch.start(config, Launch()))
    full = shape.sequence_tokens
    steps: Rows = {"dense": lambda: ours.step(full)}
    for share in (2, 4):
        steps[f"kept 1/{share}"] = lambda kept=full // share: ours.step(kept)  # type: ignore[misc]
        steps[f"oracle 1/{share}"] = lambda kept=full // share: ours.oracle_step(kept)  # type: ignore[misc]
    return rows | {name: steps[name] for name in names if name in steps}, ours


def time_rows(rows: Rows, rounds: int, device: str, clock: str) -> dict[str, list[float]]:
    """Seconds of each row in each round, after one warm-up round."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, step in rows.items():
            started = now()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(now() - started)
        print(f"round {number}/{rounds}", file=sys.stderr, flush=True)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def _layout_rank(rank: int, path: str, values: dict[str, Any], tensor: int, pipeline: int, out: Any) -> None:
    torch.set_num_threads(1)
    args = argparse.Namespace(**values)
    shape = shape_of(args)
    config = run_config(shape, precision=args.precision, device="cpu", tensor_parallel=tensor,
                        pipeline_parallel=pipeline, microbatches=2)
    ours = OurModel(config, launch.start(config, Launch(rank, rank, 2, f"file://{path}")), microbatches=2)
    full = shape.sequence_tokens
    seconds = time_rows({f"tp{tensor} pp{pipeline} dense": lambda: ours.step(full),
                         f"tp{tensor} pp{pipeline} kept 1/4": lambda: ours.step(full // 4)}, args.rounds, "cpu",
                        "wall")
    if rank == 0:
        out.put(seconds)
    launch.stop()
    leave(0)


def time_layout(args: argparse.Namespace, tensor: int, pipeline: int) -> dict[str, list[float]]:
    """Two gloo processes with one thread each, with two microbatches per step."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        out = context.SimpleQueue()
        ranks = [context.Process(target=_layout_rank,
                                 args=(r, f"{folder}/store", vars(args), tensor, pipeline, out)) for r in range(2)]
        run_together(ranks, f"tp{tensor} pp{pipeline}")
        seconds: dict[str, list[float]] = out.get()
    return seconds


def peak_resident_kilobytes() -> int:
    """Peak memory of this process so far. getrusage would include that of the process that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise ConfigError("--memory on a CPU reads VmHWM from /proc/self/status, which this system does not have; leave "
                      "--memory out")


def _alone(values: dict[str, Any], name: str, rounds: int, out: Any) -> None:
    set_threads(values["threads"])
    rows, _ = build_rows(argparse.Namespace(**values), [name])
    seconds = time_rows(rows, rounds, values["device"], values["clock"])[name]
    on_gpu = values["device"] == "cuda"
    out.put((seconds, torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_resident_kilobytes() / 2**10))


def run_alone(args: argparse.Namespace, names: list[str], rounds: int) -> dict[str, tuple[list[float], float]]:
    """Seconds and peak megabytes of each row in a fresh process: resident memory including imports, or on a GPU the
    allocated memory. A warm-up round creates the optimizer state."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in names:
        out = context.SimpleQueue()
        process = context.Process(target=_alone, args=(vars(args), name, rounds, out))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{name}: its process ended with {process.exitcode}")
        found[name] = out.get()
    return found


def table(args: argparse.Namespace, seconds: dict[str, list[float]], peaks: dict[str, float]) -> str:
    """Medians, ratios and savings as a Markdown table; TFLOP/s count the FLOPs that remain after dropping."""
    shape = shape_of(args)
    config = run_config(shape, precision=args.precision, device=args.device)
    whole = step_flops(config, policies(config).whole)
    peak = peak_tflops(torch.cuda.get_device_name()) if args.device == "cuda" else None
    columns = ("median ms", "min", "max", "/ nanoGPT", "/ oracle", "FLOPs saved", "time saved", "realised", "TFLOP/s",
               "MFU", "peak MB")
    lines = [f"| step | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for name, values in seconds.items():
        oracle = name.replace("kept", "oracle")
        cells = [f"{1000 * f(values):.0f}" for f in (statistics.median, min, max)]
        cells.append(f"{ratio(seconds, name, 'nanoGPT'):.3f}" if "nanoGPT" in seconds and "tp" not in name else "")
        cells.append(f"{ratio(seconds, name, oracle):.3f}" if oracle != name and oracle in seconds else "")
        flops = whole
        if "kept" in name or "oracle" in name:
            kept = shape.sequence_tokens // int(name[-1])
            flops = step_flops(config, policies(config).keeping(kept))
            theory = 1 - flops / whole
            dense = "dense" if "tp" not in name else name.replace("kept 1/4", "dense")
            cells.append(f"{theory:.1%}")
            saved = 1 - ratio(seconds, name, dense) if dense in seconds else None
            cells += ["", ""] if saved is None else [f"{saved:.1%}", f"{saved / theory:.0%}"]
        else:
            cells += ["", "", ""]
        tflops = flops * shape.samples / statistics.median(values) / 1e12
        cells += [f"{tflops:.3g}", f"{tflops / peak:.1%}" if peak and args.precision == "bf16" else ""]
        cells.append(f"{peaks[name]:.0f}" if name in peaks else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All requested measurements: seconds and peak megabytes by row, and where the time of a step goes.

    Raises:
        UserError: an error that the user can fix.
    """
    names = row_names(args)
    if args.compile:  # graphs compiled for one row would otherwise be reused by others, unlike in a run
        alone = run_alone(args, names, args.rounds)
        return {"seconds": {name: times for name, (times, _) in alone.items()}, "parts": {},
                "peak_megabytes": {name: peak for name, (_, peak) in alone.items()}}
    rows, ours = build_rows(args, names)
    seconds = time_rows(rows, args.rounds, args.device, args.clock)
    parts = {}
    if ours is not None:
        full = shape_of(args).sequence_tokens
        parts = {name: ours.timed_parts(kept, args.clock) for name, kept in (("dense", full), ("kept 1/4", full // 4))}
        launch.stop()
    del rows, ours
    if args.layouts:
        seconds |= time_layout(args, 2, 1) | time_layout(args, 1, 2)
    peaks = {name: peak for name, (_, peak) in run_alone(args, names, 1).items()} if args.memory else {}
    return {"seconds": seconds, "parts": parts, "peak_megabytes": peaks}


def run(args: argparse.Namespace) -> None:
    check(args)
    set_threads(args.threads)
    results = measure(args)
    where = machine.describe(args.device)
    settings = f"{args.precision}{', compiled' if args.compile else ''}, {args.rounds} rounds, {args.clock} clock"
    print(f"\n{shape_of(args).describe()}; {settings}\n{where}\n\n"
          f"{table(args, results['seconds'], results['peak_megabytes'])}\n")
    for name, found in results["parts"].items():
        total = sum(found.values())
        print(f"{name}: " + ", ".join(f"{part} {value / total:.0%}" for part, value in found.items()))
    if args.output is not None:
        arguments = {name: str(value) for name, value in vars(args).items()}
        args.output.write_text(json.dumps({"arguments": arguments, "machine": where, **results}, indent=1) + "\n")


def main(argv: list[str]) -> int:
    return exit_code_of(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
