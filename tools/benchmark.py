"""Time whole training steps side by side: ours dense, ours with dropped tokens, the oracle, and a peer.

    python tools/benchmark.py --shape 8x256 --precision fp32 --nanogpt path/to/nanoGPT --rounds 7
    python tools/benchmark.py --shape 12x512 --precision bf16 --layouts --memory --output results.json

A step is forward, backward, clipping and fused AdamW. The rows take turns, round by round, and ratios are taken within
a round, so that a machine whose speed drifts slows both sides alike; medians are printed. `oracle` is the same model
with the middle layers on one contiguous slice of k tokens, with no selection, gather or add: no token dropping can cost
less.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

import torch

from benchmarks.nanogpt import NanoGPT, load_source
from benchmarks.ours import OurModel
from benchmarks.shapes import SHAPES, Shape, run_config
from megatron_ltd.errors import UserError
from megatron_ltd.model.flops import sample_flops
from megatron_ltd.train import launch
from megatron_ltd.train.launch import Launch

Rows = dict[str, Callable[[], Any]]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8x256")
    parser.add_argument("--samples", type=int, help="samples of a step, in place of the shape's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile for ours and the peer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, timed beside ours")
    parser.add_argument("--layouts", action="store_true", help="also two processes, tensor and pipeline parallel")
    parser.add_argument("--memory", action="store_true", help="also peak memory, each row in a fresh process")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all numbers as JSON")
    return parser.parse_args(argv)


def shape_of(args: argparse.Namespace) -> Shape:
    shape = SHAPES[args.shape]
    return shape if args.samples is None else Shape(**{**vars(shape), "samples": args.samples})


def build_rows(args: argparse.Namespace, only: str | None = None) -> tuple[Rows, OurModel | None]:
    """The steps to time, by name; with `only`, just that one, so that nothing else takes memory."""
    shape, device = shape_of(args), torch.device(args.device)
    rows: Rows = {}
    if args.nanogpt is not None and only in (None, "nanoGPT"):
        rows["nanoGPT"] = NanoGPT(load_source(args.nanogpt), shape, precision=args.precision, device=device,
                                  compiled=args.compile).step
    if only == "nanoGPT":
        return rows, None
    config = run_config(shape, precision=args.precision, device=args.device, compiled=args.compile)
    ours = OurModel(config, launch.start(config, Launch()))
    full = shape.sequence_tokens
    rows["dense"] = lambda: ours.step(full)
    for share in (2, 4):
        rows[f"kept 1/{share}"] = lambda kept=full // share: ours.step(kept)  # type: ignore[misc]
        rows[f"oracle 1/{share}"] = lambda kept=full // share: ours.oracle_step(kept)  # type: ignore[misc]
    return ({only: rows[only]} if only else rows), ours


def time_rows(rows: Rows, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each row in each round; one round before them is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, step in rows.items():
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
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
                         f"tp{tensor} pp{pipeline} kept 1/4": lambda: ours.step(full // 4)}, args.rounds, "cpu")
    if rank == 0:
        out.put(seconds)
    launch.stop()


def time_layout(args: argparse.Namespace, tensor: int, pipeline: int) -> dict[str, list[float]]:
    """Two gloo processes of one thread each, on two microbatches a step."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        out = context.SimpleQueue()
        ranks = [context.Process(target=_layout_rank,
                                 args=(r, f"{folder}/store", vars(args), tensor, pipeline, out)) for r in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"tp{tensor} pp{pipeline}: a rank ended with {[p.exitcode for p in ranks]}")
        seconds: dict[str, list[float]] = out.get()
    return seconds


def _peak(values: dict[str, Any], name: str, out: Any) -> None:
    rows, _ = build_rows(argparse.Namespace(**values), name)
    for _ in range(2):
        rows[name]()
    if values["device"] == "cuda":
        out.put(torch.cuda.max_memory_allocated() / 2**20)
    else:
        out.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def peak_megabytes(args: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Peak resident memory of two steps in a fresh process, imports included; on a GPU, peak allocated."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name in names:
        out = context.SimpleQueue()
        process = context.Process(target=_peak, args=(vars(args), name, out))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{name}: the process for its memory ended with {process.exitcode}")
        peaks[name] = out.get()
    return peaks


def table(args: argparse.Namespace, seconds: dict[str, list[float]], peaks: dict[str, float]) -> str:
    """Medians, ratios and savings as a Markdown table."""
    shape = shape_of(args)
    config = run_config(shape, precision=args.precision, device=args.device).model
    dropped = range(1, shape.layers - 1)
    lines = ["| step | median ms | min | max | / nanoGPT | / oracle | FLOPs saved | time saved | realised | peak MB |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for name, values in seconds.items():
        cells = [f"{1000 * f(values):.0f}" for f in (statistics.median, min, max)]
        cells.append(f"{ratio(seconds, name, 'nanoGPT'):.3f}" if "nanoGPT" in seconds and "tp" not in name else "")
        cells.append(f"{ratio(seconds, name, name.replace('kept', 'oracle')):.3f}" if name.startswith("kept") else "")
        if "kept" in name or "oracle" in name:
            kept = shape.sequence_tokens // int(name[-1])
            theory = 1 - sample_flops(config, dropped, kept) / sample_flops(config)
            dense = "dense" if "tp" not in name else name.replace("kept 1/4", "dense")
            saved = 1 - ratio(seconds, name, dense)
            cells += [f"{theory:.1%}", f"{saved:.1%}", f"{saved / theory:.0%}"]
        else:
            cells += ["", "", ""]
        cells.append(f"{peaks[name]:.0f}" if name in peaks else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        rows, ours = build_rows(args)
        seconds = time_rows(rows, args.rounds, args.device)
        assert ours is not None
        full = shape_of(args).sequence_tokens
        parts = {name: ours.timed_parts(kept) for name, kept in (("dense", full), ("kept 1/4", full // 4))}
        launch.stop()
        if args.layouts:
            seconds |= time_layout(args, 2, 1) | time_layout(args, 1, 2)
        peaks = peak_megabytes(args, list(rows)) if args.memory else {}
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{shape_of(args).describe()}, {args.precision}, {args.device}, torch {torch.__version__}, "
          f"{args.rounds} rounds, {datetime.now(UTC):%Y-%m-%d}\n\n{table(args, seconds, peaks)}\n")
    for name, found in parts.items():
        total = sum(found.values())
        print(f"{name}: " + ", ".join(f"{part} {value / total:.0%}" for part, value in found.items()))
    if args.output is not None:
        args.output.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": seconds,
                                           "parts": parts, "peak_megabytes": peaks}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
