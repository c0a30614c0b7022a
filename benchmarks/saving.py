"""How long a save holds up training, at once and in the background, and with a copy to another folder behind it.

    python -m benchmarks.saving --gigabytes 0.1 1 --rounds 5 --folder /tmp/saving

A round trains a fixed number of made-up steps (matrix products on one thread) four times: without a save, and with one
save in the middle, at once, in the background, and in the background with --upload. The four alternate, so that a noisy
machine disturbs all alike. `blocked` is the time until `save` returns, `whole` how much longer the round took than that
without a save, which includes the processor time that the background writer takes from training.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch

from megatron_ltd.checkpoint.uploader import Uploader
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.log import Console

WAYS = ("no save", "synchronous", "in the background", "in the background, copied")
QUIET = Console(speaks=False)
TENSOR_NUMBERS = 4 << 20
SIDE = 1024


def steps(count: int, weight: torch.Tensor) -> None:
    for _ in range(count):
        weight = torch.tanh(weight @ weight)


def one_round(way: str, tensors: dict[str, torch.Tensor], folder: Path, count: int) -> tuple[float, float]:
    """Seconds for which `save` blocked, and of the whole round without the last wait for the background."""
    weight = torch.randn(SIDE, SIDE) / SIDE ** 0.5
    copied = "copied" in way
    writer = CheckpointWriter(folder / "own", None, way.startswith("in the background"), console=QUIET,
                              uploader=Uploader(str(folder / "copies"), 1, QUIET) if copied else None)
    writer.save(1, tensors, config={}, counters={})  # what is made once, such as the copies' memory
    writer.wait()
    while writer.uploader is not None and not writer.uploader.idle():
        time.sleep(0.01)
    started = time.monotonic()
    steps(count // 2, weight)
    asked = time.monotonic()
    if way != "no save":
        writer.save(2, tensors, config={}, counters={})
    blocked = time.monotonic() - asked
    steps(count - count // 2, weight)
    whole = time.monotonic() - started
    writer.close()
    shutil.rmtree(folder)
    return blocked, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; it must not exist")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| checkpoint | save | blocks training, median (range) | relative to a synchronous save | "
          "whole round, against one without a save |")
    print("|---|---|---|---|---|")
    for size in options.gigabytes:
        count = max(1, round(size * 1e9 / 4 / TENSOR_NUMBERS))
        tensors = {f"model.{i}": torch.randn(round(size * 1e9 / 4 / count)) for i in range(count)}
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                found[way].append(one_round(way, tensors, options.folder, options.steps))
        synchronous = statistics.median(blocked for blocked, _ in found["synchronous"])
        for way in WAYS[1:]:
            blocked = [seconds for seconds, _ in found[way]]
            longer = statistics.median(with_save / without - 1 for (_, with_save), (_, without)
                                       in zip(found[way], found["no save"], strict=True))
            print(f"| {size:g} GB | {way} | {statistics.median(blocked):.2f} s ({min(blocked):.2f} to "
                  f"{max(blocked):.2f}) | {statistics.median(blocked) / synchronous:.2f} | {longer:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
