"""How long data-parallel processes take to have a model's initial weights: each draws all of them, or each draws a
share and broadcasts it. Processes on a CPU, one thread each; the two alternate within a round.

    python -m benchmarks.initial_weights --processes 2 --rounds 3

Drawing is processor time of the thread that draws; a broadcast is gloo's, through this machine's memory.
"""

import argparse
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.machine import describe
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model import init
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.mesh import Mesh, build_mesh

MODEL = ModelConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, seq_length=1024, vocab_size=50304)
WAYS = ("each draws all", "in turns")
_CPU = torch.device("cpu")


def allocated(mesh: Mesh, in_turns: bool) -> tuple[float, float]:
    """Seconds until all processes have all weights, and processor seconds that this one spent on drawing."""
    drawing = []

    def timed(*args: object) -> torch.Tensor:
        started = time.thread_time()
        value = initial_value(*args)  # type: ignore[arg-type]
        drawing.append(time.thread_time() - started)
        return value

    initial_value, init.initial_value = init.initial_value, timed
    try:
        model = GPT(MODEL, TensorParallel(mesh.tp), StageSpan(0, MODEL.num_layers, MODEL.num_layers))
        modules = [*((block, f"stack.blocks.{layer}") for layer, block in model.stack.blocks.items()), (model, "")]
        dist.barrier()
        started = time.perf_counter()
        turns = init.draw_in_turns(modules, MODEL, 1, mesh.data_group) if in_turns else None
        for module, prefix in modules:
            init.materialize(module, MODEL, prefix=prefix, seed=1, device=_CPU, turns=turns)
        dist.barrier()
        return time.perf_counter() - started, sum(drawing)
    finally:
        init.initial_value = initial_value


def process(rounds: int) -> None:
    """One process of a measurement; the first prints the table."""
    torch.set_num_threads(1)
    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", timeout=timeout)
    mesh = build_mesh("cpu", pp=1, dp=dist.get_world_size(), tp=1, shard_parameters=True, timeout=timeout)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way, rows in found.items():
            rows.append(allocated(mesh, way == "in turns"))
    if dist.get_rank() == 0:
        numbers = sum(parameter.numel() for parameter in GPT(
            MODEL, TensorParallel(mesh.tp), StageSpan(0, MODEL.num_layers, MODEL.num_layers)).parameters())
        print(f"{describe('cpu')}; {numbers / 1e6:.0f} million numbers, {dist.get_world_size()} processes, "
              f"{rounds} rounds\n")
        print("| weights | seconds | / each draws all | drawing, CPU s a process |\n|---|--:|--:|--:|")
        for way, rows in found.items():
            ratios = [ours / base for (ours, _), (base, _) in zip(rows[1:], found[WAYS[0]][1:], strict=True)]
            seconds, drawing = (statistics.median(column) for column in zip(*rows[1:], strict=True))
            print(f"| {way} | {seconds:.2f} | {statistics.median(ratios):.2f} | {drawing:.2f} |")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time until data-parallel processes have their initial weights.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.processes),
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--no-python"]
    program = f"from benchmarks.initial_weights import process; process({args.rounds})"
    subprocess.run([*launcher, sys.executable, "-c", program], check=True)


if __name__ == "__main__":
    main()
