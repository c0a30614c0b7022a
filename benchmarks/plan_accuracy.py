"""What the planner predicts beside what is measured: peak memory and step time on CPU processes, and published figures.

    python -m benchmarks.plan_accuracy --memory --times --published

Memory is the peak of live tensor bytes over two steps on the busiest process, and beside it what the process' resident
memory grew by.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from benchmarks.machine import describe
from megatron_ltd.config import RunConfig
from megatron_ltd.plan.cluster import Cluster, known_cluster
from megatron_ltd.plan.derived import data_parallel_size, global_batch_size, policies
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.plan.layout import Layout
from megatron_ltd.plan.memory import MemoryModel
from megatron_ltd.plan.roofline import Roofline
from megatron_ltd.settings.cli import parse_run_config

GPT = ("--num-layers 8 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --vocab-size 1024 "
       "--micro-batch-size 2 --lr 1e-3 --train-iters 100 --mock-data")
LLAMA = (GPT + " --normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear "
         "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2")
LTD = " --random-ltd --random-ltd-start-length 32 --random-ltd-steps 1000"
LONG = GPT.replace("--seq-length 128", "--seq-length 512").replace("--micro-batch-size 2", "--micro-batch-size 1")
WIDE = GPT.replace("--hidden-size 128", "--hidden-size 512").replace("--num-layers 8", "--num-layers 4")


@dataclass(frozen=True)
class Case:
    """One run: flags and the number of processes."""

    name: str
    flags: str
    processes: int = 1

    @property
    def config(self) -> RunConfig:
        return parse_run_config(self.flags.split())[0]


def _cases() -> tuple[Case, ...]:
    tp, pp = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
    zero3 = "--data-parallel-sharding-strategy optim_grads_params"
    return (
        Case("GPT", f"{GPT} --global-batch-size 8"),
        Case("GPT, one microbatch", f"{GPT} --global-batch-size 2"),
        Case("GPT, selective", f"{GPT} --global-batch-size 8 --recompute-granularity selective"),
        Case("GPT, full", f"{GPT} --global-batch-size 8 --recompute-granularity full"),
        Case("GPT, 32 of 128 kept", f"{GPT} --global-batch-size 8" + LTD),
        Case("GPT, 32 of 128 kept, full", f"{GPT} --global-batch-size 8 --recompute-granularity full" + LTD),
        Case("GPT, 512 tokens", f"{LONG} --global-batch-size 4"),
        Case("GPT, 512 tokens, full", f"{LONG} --global-batch-size 4 --recompute-granularity full"),
        Case("GPT, 512 wide", f"{WIDE} --global-batch-size 4"),
        Case("GPT, bf16", f"{GPT} --global-batch-size 8 --bf16"),
        Case("GPT, tp 2", f"{GPT} --global-batch-size 8 {tp} 2", 2),
        Case("GPT, tp 2, sequence parallel, kept 32", f"{GPT} --global-batch-size 8 {tp} 2 --sequence-parallel "
             "--random-ltd-strata 2" + LTD, 2),
        Case("GPT, pp 2", f"{GPT} --global-batch-size 8 {pp} 2", 2),
        Case("GPT, pp 4, 8 microbatches", f"{GPT} --global-batch-size 16 {pp} 4", 4),
        Case("GPT, pp 2, interleaved", f"{GPT} --global-batch-size 8 {pp} 2 --pipeline-schedule interleaved "
             "--num-layers-per-virtual-pipeline-stage 2", 2),
        Case("GPT, pp 2, zbv", f"{GPT} --global-batch-size 8 {pp} 2 --pipeline-schedule zbv", 2),
        Case("GPT, pp 2, interleaved zero bubble", f"{GPT} --global-batch-size 8 {pp} 2 --pipeline-schedule "
             "interleaved-zero-bubble --num-layers-per-virtual-pipeline-stage 2", 2),
        Case("GPT, dp 2", f"{GPT} --global-batch-size 8", 2),
        Case("GPT, dp 2, ZeRO-2", f"{GPT} --global-batch-size 8 --use-distributed-optimizer", 2),
        Case("GPT, 512 wide, dp 4, ZeRO-3", f"{WIDE} --global-batch-size 16 {zero3}", 4),
        Case("GPT, bf16, dp 2, ZeRO-2", f"{GPT} --global-batch-size 8 --use-distributed-optimizer --bf16", 2),
        Case("Llama", f"{LLAMA} --global-batch-size 8"),
        Case("Llama, full", f"{LLAMA} --global-batch-size 8 --recompute-granularity full"),
        Case("Llama, tp 2, sequence parallel", f"{LLAMA} --global-batch-size 8 {tp} 2 --sequence-parallel", 2),
        Case("Llama, dp 2, ZeRO-3, full", f"{LLAMA} --global-batch-size 8 {zero3} --recompute-granularity full", 2),
        Case("Llama, tp 2 x pp 2 x dp 2, ZeRO-2, 32 kept", f"{LLAMA} --global-batch-size 16 {tp} 2 {pp} 2 "
             "--use-distributed-optimizer" + LTD, 8),
        # Chosen after the arithmetic was complete, to see whether it holds for what it was not written with.
        Case("GPT, rotary positions *", f"{GPT} --global-batch-size 8 --position-embedding-type rope"),
        Case("Llama, norms of queries and keys *", f"{LLAMA} --global-batch-size 8 --qk-layernorm"),
        Case("GPT, SGD, pp 2 x dp 2, ZeRO-2, zbv *", f"{GPT} --global-batch-size 16 {pp} 2 --optimizer sgd "
             "--pipeline-schedule zbv --use-distributed-optimizer", 4),
        Case("Llama, pp 2, interleaved, full, 32 kept *", f"{LLAMA} --global-batch-size 8 {pp} 2 --pipeline-schedule "
             "interleaved --num-layers-per-virtual-pipeline-stage 2 --recompute-granularity full" + LTD, 2),
        Case("GPT, 512 tokens, bf16, tp 2 x dp 2, ZeRO-3 *", f"{LONG} --global-batch-size 4 {tp} 2 {zero3} --bf16", 4),
    )


CASES = _cases()


@dataclass(frozen=True)
class Measured:
    """Of one process: the peak of live bytes, what resident memory grew by, and the seconds of each step."""

    live_bytes: int
    resident_bytes: int
    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]


def _resident(field: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field))


def _process(rank: int, case: Case, folder: str, steps: int, memory: bool) -> None:
    """Train a few steps on random tokens and write down what was measured."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    from benchmarks.ours import OurModel
    from megatron_ltd.parallel.mesh import build_mesh
    from megatron_ltd.train.live_bytes import LiveBytes
    from megatron_ltd.train.process.environment import Launch
    from megatron_ltd.train.process.launch import Runtime

    torch.set_num_threads(1)
    timeout, config = timedelta(minutes=5), case.config
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=case.processes, timeout=timeout)
    parallel, dp = config.parallel, data_parallel_size(config, case.processes)
    mesh = build_mesh("cpu", pp=parallel.pipeline_model_parallel_size, dp=dp, tp=parallel.tensor_model_parallel_size,
                      shard_parameters=parallel.sharding != "no_shard", timeout=timeout)
    runtime = Runtime(Launch(rank, rank, case.processes, None), torch.device("cpu"), mesh, [],
                      dist.HashStore(), [])
    microbatches = global_batch_size(config, dp) // (config.training.micro_batch_size * dp)
    before = _resident("VmRSS")
    plan, seconds, processor = policies(config).plan(0), [], []
    live = LiveBytes()
    if memory:
        live.__enter__()
    model = OurModel(config, runtime, microbatches)
    for _ in range(steps):
        live.peak = 0
        dist.barrier()
        started, worked = time.perf_counter(), time.process_time()
        model.step_of(plan)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - worked)
    if memory:
        live.__exit__(None, None, None)
    found = [live.peak, _resident("VmHWM") - before, seconds, processor]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case, steps: int = 2, *, memory: bool = True) -> list[Measured]:
    """A case on its processes, one result each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.pipelining"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_process, args=(rank, case, folder, steps, memory))
                     for rank in range(case.processes)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{case.name}: a process failed")
        return [Measured(*json.loads(Path(folder, f"{rank}.json").read_text()))
                for rank in range(case.processes)]


def memory_table(cases: Sequence[Case] = CASES) -> str:
    """Predicted and measured peaks of the process of a pipeline with the largest error."""
    lines = ["| run | processes | predicted MB | live bytes, MB | error | resident, MB |", "|---|--:|--:|--:|--:|--:|"]
    worst = 0.0
    for case in cases:
        config, found = case.config, measure(case)
        layout = Layout.of(config, case.processes)
        model, plan = MemoryModel(config, layout, "cpu"), policies(config).plan(0)
        peaks = [(model.peak(rank, plan).total, found[rank * layout.dp * layout.tp]) for rank in range(layout.pp)]
        predicted, process = max(peaks, key=lambda pair: abs(pair[0] / pair[1].live_bytes - 1.0))
        error = predicted / process.live_bytes - 1.0
        worst = max(worst, abs(error))
        lines.append(f"| {case.name} | {case.processes} | {predicted / 1e6:.2f} | {process.live_bytes / 1e6:.2f} | "
                     f"{error:+.1%} | {process.resident_bytes / 1e6:.0f} |")
    return "\n".join([*lines, "", f"{len(cases)} runs, largest error {worst:.1%}"])


BIG = ("--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 256 --vocab-size 2048 --lr 1e-3 "
       "--train-iters 100 --mock-data --global-batch-size 8")


def _timed_cases() -> tuple[Case, ...]:
    """Layouts of one step of eight samples, on one or two processes."""
    tp, pp = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
    long = BIG.replace("--train-iters", "--random-ltd --random-ltd-start-length 64 --random-ltd-steps 1000 "
                                        "--train-iters")
    return (
        Case("1 process", f"{BIG} --micro-batch-size 4"),
        Case("pp 2, 1f1b, 4 microbatches", f"{BIG} --micro-batch-size 2 {pp}", 2),
        Case("1 process, full recomputation", f"{BIG} --micro-batch-size 4 --recompute-granularity full"),
        Case("1 process, 64 of 256 kept", f"{long} --micro-batch-size 4"),
        Case("dp 2", f"{BIG} --micro-batch-size 4", 2),
        Case("dp 2, ZeRO-3, 4 microbatches",
             f"{BIG} --micro-batch-size 1 --data-parallel-sharding-strategy optim_grads_params", 2),
        Case("tp 2", f"{BIG} --micro-batch-size 4 {tp}", 2),
        Case("tp 2, sequence parallel, full recomputation",
             f"{BIG} --micro-batch-size 4 {tp} --sequence-parallel --recompute-granularity full", 2),
        Case("pp 2, 1f1b, 2 microbatches", f"{BIG} --micro-batch-size 4 {pp}", 2),
        Case("pp 2, interleaved, 8 microbatches", f"{BIG} --micro-batch-size 1 {pp} --pipeline-schedule interleaved "
             "--num-layers-per-virtual-pipeline-stage 2", 2),
        Case("dp 2, 64 of 256 kept", f"{long} --micro-batch-size 4", 2),
        Case("pp 2, 64 of 256 kept, full recomputation",
             f"{long} --micro-batch-size 2 {pp} --recompute-granularity full", 2),
    )


TIMED_CASES = _timed_cases()
FITTED = 2
"""Cases, from the first on, to which the machine's constants are fitted."""


def predicted_seconds(case: Case, rates: tuple[float, float, float]) -> float:
    """Of a step, of the busiest process, without waiting for others.

    Args:
        rates: of products in TFLOP/s, of memory in GB/s, of a link in GB/s.
    """
    config = case.config
    cluster = Cluster(case.processes, "core", 1.0, rates[0], rates[1], case.processes, rates[2], rates[2],
                      product_efficiency=1.0, attention_efficiency=0.5, memory_efficiency=1.0, link_efficiency=1.0,
                      overlap=1e-9)
    roofline = Roofline(config, Layout.of(config, case.processes), cluster, policies(config))
    time = roofline.step(policies(config).plan(0))
    return time.busiest + time.data + time.update


def fitted_rates(measured: Sequence[float]) -> tuple[float, float, float]:
    """The three constants of the machine from two layouts: the least squared relative error over a grid."""
    def error(rates: tuple[float, float, float]) -> float:
        return sum((predicted_seconds(case, rates) / seconds - 1.0) ** 2
                   for case, seconds in zip(TIMED_CASES[:FITTED], measured, strict=True))

    grid = [(products, memory, link) for products in GRID for memory in (1, 2, 5, 10, 20) for link in (0.1, 0.3, 1, 3)]
    return min(grid, key=error)


GRID = [0.01 * 1.1**power for power in range(40)]


def time_table(rounds: int = 3) -> str:
    """Measured and predicted processor seconds of a step, and how many pairs of layouts are ranked right."""
    seconds = [_seconds(case, rounds) for case in TIMED_CASES]
    rates = fitted_rates(seconds[:FITTED])
    predicted = [predicted_seconds(case, rates) for case in TIMED_CASES]
    lines = ["| layout | predicted s | measured s | error |", "|---|--:|--:|--:|"]
    lines += [f"| {case.name}{' (fitted)' if place < FITTED else ''} | {guess:.3f} | {found:.3f} | "
              f"{guess / found - 1.0:+.0%} |"
              for place, (case, guess, found) in enumerate(zip(TIMED_CASES, predicted, seconds, strict=True))]
    pairs = list(itertools.combinations(range(len(TIMED_CASES)), 2))
    right = sum((predicted[one] < predicted[other]) == (seconds[one] < seconds[other]) for one, other in pairs)
    clear = [(one, other) for one, other in pairs if abs(seconds[one] / seconds[other] - 1.0) > 0.05]
    clearly = sum((predicted[one] < predicted[other]) == (seconds[one] < seconds[other]) for one, other in clear)
    constants = f"{rates[0] * 1000:.0f} GFLOP/s, {rates[1]} GB/s of memory, {rates[2]} GB/s of a link"
    return "\n".join([*lines, "", f"constants: {constants}; {right} of {len(pairs)} pairs ranked right "
                      f"({right / len(pairs):.0%}); of those that differ by more than 5%, {clearly} of {len(clear)} "
                      f"({clearly / len(clear):.0%})"])


def _seconds(case: Case, rounds: int) -> float:
    """Processor seconds of the busiest process in its fastest step after the first: unlike the time on the wall they
    hardly depend on what else the machine does."""
    found = measure(case, rounds + 1, memory=False)
    return max(min(process.processor_seconds[1:]) for process in found)


@dataclass(frozen=True)
class Published:
    """A row of somebody's table.

    Args:
        rate: TFLOP/s of an accelerator as they count it, or tokens a second of one.
    """

    name: str
    flags: str
    gpus: int
    gpu: str
    rate: float
    changes: dict[str, float]


UNFUSED = {"attention_efficiency": 0.08}
"""Megatron-LM of 2021 wrote and read the scores of attention: per score about 12 bytes at 1.6 TB/s for some 190 FLOPs
(heads of 96 to 128 channels, half of the scores needed), which is 8% of an A100's peak."""
SLOW_H100 = {"memory_gb": 96, "memory_gb_per_second": 2400, "product_efficiency": 0.55, "fused": 0.6}
"""torchtitan's H100s have HBM2e at 2.4 TB/s and a limit of 500 W instead of 700 W (their text); compiled layers."""


def _megatron(name: str, tp: int, pp: int, micro: int, batch: int, layers: int, hidden: int, heads: int, gpus: int,
              chunk: int, rate: float) -> Published:
    """Of table 1 in arXiv 2104.04473; layouts from examples/sc21/run_table_1.sh in NVIDIA/Megatron-LM."""
    schedule = f" --pipeline-schedule interleaved --num-layers-per-virtual-pipeline-stage {chunk}" if chunk else ""
    return Published(name, f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --seq-length "
                     f"2048 --vocab-size 51200 --micro-batch-size {micro} --global-batch-size {batch} "
                     f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --fp16 "
                     "--recompute-granularity full --lr 1e-4 --train-iters 10 --mock-data" + schedule, gpus, "a100",
                     rate, UNFUSED)


MEGATRON = (
    _megatron("1.7B", 1, 1, 16, 512, 24, 2304, 24, 32, 0, 137),
    _megatron("3.6B", 2, 1, 16, 512, 30, 3072, 32, 64, 0, 138),
    _megatron("7.5B", 4, 1, 16, 512, 36, 4096, 32, 128, 0, 142),
    _megatron("18.4B", 8, 1, 8, 1024, 40, 6144, 48, 256, 0, 135),
    _megatron("39.1B", 8, 2, 4, 1536, 48, 8192, 64, 512, 0, 138),
    _megatron("76.1B", 8, 4, 2, 1792, 60, 10240, 80, 1024, 5, 140),
    _megatron("145.6B", 8, 8, 2, 2304, 80, 12288, 96, 1536, 5, 148),
    _megatron("310.1B", 8, 16, 1, 2160, 96, 16384, 128, 1920, 3, 155),
    _megatron("529.6B", 8, 35, 1, 2520, 105, 20480, 128, 2520, 1, 163),
    _megatron("1008B", 8, 64, 1, 3072, 128, 25600, 160, 3072, 0, 163),
)

LLAMA_3 = ("--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear "
           "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --vocab-size 128256 "
           "--seq-length 8192 --bf16 --data-parallel-sharding-strategy optim_grads_params --lr 1e-4 --train-iters 10 "
           "--mock-data")
EIGHT = f"--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 14336 {LLAMA_3}"
SEVENTY = f"--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --ffn-hidden-size 28672 {LLAMA_3}"
TITAN = (
    Published("Llama 3.1 8B, 8 H100, compiled", f"{EIGHT} --micro-batch-size 2 --global-batch-size 16", 8, "h100", 6667,
              SLOW_H100),
    Published("Llama 3.1 8B, 8 H100", f"{EIGHT} --micro-batch-size 2 --global-batch-size 16", 8, "h100", 5762,
              SLOW_H100 | {"fused": 1.0}),
    Published("Llama 3.1 8B, 128 H100, compiled", f"{EIGHT} --micro-batch-size 2 --global-batch-size 256", 128, "h100",
              6514, SLOW_H100),
    Published("Llama 3 8B, 64 A100", f"{EIGHT} --micro-batch-size 1 --global-batch-size 64", 64, "a100", 2904,
              {"fused": 0.6}),
    Published("Llama 3 70B, 64 A100, full", f"{SEVENTY} --micro-batch-size 1 --global-batch-size 64 "
              "--recompute-granularity full", 64, "a100", 331, {"fused": 0.6}),
)
"""github.com/pytorch/torchtitan: benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3; docs/performance.md at
commit 0413364. Their 70B and 405B on H100 use Float8, which is not modelled."""


def published_tables() -> str:
    """Predicted beside published model FLOPs utilisation; where others recompute a part, without recomputation and with
    all of it."""
    lines = ["| model | accelerators | predicted | published | predicted / published |", "|---|--:|--:|--:|--:|"]
    for row in (*MEGATRON, *TITAN):
        config, peak = parse_run_config(row.flags.split())[0], known_cluster(row.gpus, row.gpu).peak_tflops * 1e12
        cluster = replace(known_cluster(row.gpus, row.gpu), **row.changes)  # type: ignore[arg-type]
        layout = Layout.of(config, row.gpus)
        plan = policies(config).whole
        samples = layout.micro_samples * layout.microbatches * layout.dp
        flops = samples * step_flops(config, plan)
        predicted = [flops / Roofline(config, replace(layout, recompute=recompute), cluster, policies(config)).step(
            plan).seconds / row.gpus / peak for recompute in dict.fromkeys((layout.recompute, "full"))]
        if row in MEGATRON:  # their count includes recomputation
            published = row.rate * 1e12 * flops / (samples * _counted_by_megatron(config)) / peak
        else:
            published = row.rate * step_flops(config, plan) / config.model.seq_length / peak
        lines.append(f"| {row.name} | {row.gpus:,} {row.gpu.upper()} | "
                     f"{' to '.join(f'{guess:.1%}' for guess in predicted)} | {published:.1%} | "
                     f"{' to '.join(f'{guess / published:.2f}' for guess in predicted)} |")
    return "\n".join(lines)


def _counted_by_megatron(config: RunConfig) -> float:
    """FLOPs of a sample by equation 3 of arXiv 2104.04473, with two forward passes."""
    s, h, layers = config.model.seq_length, config.model.hidden_size, config.model.num_layers
    return 96 * s * layers * h * h * (1 + s / (6 * h) + 51200 / (16 * layers * h))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (("memory", "peak memory of processes"), ("times", "seconds of a step in different layouts"),
                       ("published", "figures of others")):
        parser.add_argument(f"--{name}", action="store_true", help=text)
    args = parser.parse_args(argv)
    print(f"{describe('cpu')}\n")
    for wanted, table in ((args.memory, memory_table), (args.times, time_table), (args.published, published_tables)):
        if wanted:
            print(f"{table()}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
