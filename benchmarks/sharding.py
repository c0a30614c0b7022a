"""Peak resident memory and time of a step with replication, ZeRO-2 and ZeRO-3: two processes on a CPU, 12 layers x 768
(85M parameters). The kinds alternate within a round.

    python -m benchmarks.sharding --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import commit, processor

SETTINGS = ("--mock-data --vocab-size 1024 --num-layers 12 --hidden-size 768 --num-attention-heads 8 --seq-length 32 "
            "--micro-batch-size 1 --global-batch-size 4 --lr 1e-4 --train-iters 4 --log-interval 1 --eval-iters 0")
KINDS = {"replicated": "no_shard", "ZeRO-2": "optim_grads", "ZeRO-3": "optim_grads_params"}
_PROCESS = "import sys; from benchmarks.sharding import process; process(sys.argv[1:])"


def process(arguments: list[str]) -> None:
    """One process of a run: train, then write down its peak in the folder of the metrics file."""
    from megatron_ltd import pretrain_gpt
    if pretrain_gpt.main(arguments) != 0:
        sys.exit(1)
    peak = next(int(line.split()[1]) // 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM"))
    (Path(arguments[-1]).parent / f"peak-{os.environ['RANK']}").write_text(str(peak))


def run(kind: str) -> tuple[int, float]:
    """Peak MB of the larger process, and the median seconds of a step after the first."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                    "--rdzv-endpoint", "localhost:0", "--no-python"]
        subprocess.run([*launcher, sys.executable, "-c", _PROCESS, *SETTINGS.split(),
                        "--data-parallel-sharding-strategy", KINDS[kind], "--metrics-file", str(metrics)],
                       check=True, stdout=subprocess.DEVNULL)
        seconds = [json.loads(line).get("step_seconds") for line in metrics.read_text().splitlines()]
        peaks = [int(path.read_text()) for path in Path(folder).glob("peak-*")]
    return max(peaks), statistics.median([second for second in seconds if second is not None][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of the three kinds of data parallelism.")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    rows: dict[str, list[tuple[int, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, found in rows.items():
            found.append(run(kind))
    print(f"{processor('cpu')}, 1 thread a process, torch {torch.__version__}, commit {commit()}, {rounds} rounds\n")
    print("| data parallelism | peak MB a process | median ms of a step | / replicated |\n|---|--:|--:|--:|")
    for kind, found in rows.items():
        ratios = [seconds / base for (_, seconds), (_, base) in zip(found, rows["replicated"], strict=True)]
        print(f"| {kind} | {max(peak for peak, _ in found)} | "
              f"{1000 * statistics.median(seconds for _, seconds in found):.0f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
