"""What the planner predicts beside what is measured: peak memory and step time on CPU processes, and published figures.

    python -m benchmarks.plan_accuracy --memory --times --published

Memory is the peak of live tensor bytes over two steps on the busiest process, and beside it what the process' resident
memory grew by.
"""

import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from megatron_ltd.config import RunConfig
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
    from megatron_ltd.plan.derived import data_parallel_size, global_batch_size, policies
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
    runtime = Runtime(Launch(rank, rank, case.processes, None), torch.device("cpu"), mesh, [])
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
    found = [live.peak, _resident("VmHWM") - before, seconds, processor, list(live.sizes) if memory else []]
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
        return [Measured(*json.loads(Path(folder, f"{rank}.json").read_text())[:4])
                for rank in range(case.processes)]
