"""Trains a few steps of a case on processes of its own, and measures them."""

import json
import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from benchmarks.plan_accuracy.cases import Case
from benchmarks.plan_accuracy.critical_path import Note, Notebook
from benchmarks.together import run_together
from megatron_ltd.plan.derived import data_parallel_size, global_batch_size, policies


@dataclass(frozen=True)
class Measured:
    """Of one process.

    Args:
        live_bytes: their peak.
        resident_bytes: what resident memory grew by.
        notes: of its communication in each step, if times are measured.
    """

    live_bytes: int
    resident_bytes: int
    notes: tuple[tuple[Note, ...], ...]


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
    store = dist.FileStore(f"{folder}/rendezvous", case.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.processes, timeout=timeout)
    parallel, dp = config.parallel, data_parallel_size(config, case.processes)
    mesh = build_mesh("cpu", pp=parallel.pipeline_model_parallel_size, dp=dp, tp=parallel.tensor_model_parallel_size,
                      shard_parameters=parallel.sharding != "no_shard", timeout=timeout)
    runtime = Runtime(Launch(rank, rank, case.processes, None), torch.device("cpu"), mesh, [], store, [])
    microbatches = global_batch_size(config, dp) // (config.training.micro_batch_size * dp)
    before = _resident("VmRSS")
    plan, notes, live, notebook = policies(config).plan(0), [], LiveBytes(), Notebook()
    with live if memory else notebook.kept():
        model = OurModel(config, runtime, microbatches)
        for _ in range(steps):
            live.peak = 0
            dist.barrier()
            notebook.begin()
            model.step_of(plan)
            notes.append(notebook.end())
    found = [live.peak, _resident("VmHWM") - before, notes]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _read(path: Path) -> Measured:
    live, resident, notes = json.loads(path.read_text())
    return Measured(live, resident, tuple(
        tuple(Note(kind, tuple(key), receives, tuple(members), seconds)
              for kind, key, receives, members, seconds in step) for step in notes))


def measure(case: Case, steps: int = 2, *, memory: bool = True) -> list[Measured]:
    """A case on its processes, one result each: memory, or times.

    A process is faster while other cores are idle. So that the times of few processes compare with those of many, a
    case with fewer processes than there are cores is run several times at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.pipelining"])
    copies = 1 if memory else max(1, (os.cpu_count() or 1) // case.processes)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, str(copy)) for copy in range(copies)]
        processes = [context.Process(target=_process, args=(rank, case, str(of_copy), steps, memory))
                     for of_copy in folders for rank in range(case.processes)]
        for of_copy in folders:
            of_copy.mkdir()
        run_together(processes, case.name)
        return [_read(folders[0] / f"{rank}.json") for rank in range(case.processes)]
