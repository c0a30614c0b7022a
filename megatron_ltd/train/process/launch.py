"""Joins this process to the others of its run: process group, device and mesh."""

import ctypes
import platform
import resource
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import megatron_ltd
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError, flag_name
from megatron_ltd.parallel.agreement import disagreements, gather_json
from megatron_ltd.parallel.mesh import Mesh, build_mesh
from megatron_ltd.train.process import siblings, stacks
from megatron_ltd.train.process.attempt import attempt_store
from megatron_ltd.train.process.environment import (
    Launch,
    choose_interface,
    make_cublas_deterministic,
    prepare_accelerator,
)

_M_MMAP_THRESHOLD = -3
"""glibc's number of this setting (malloc.h)."""


@dataclass(frozen=True)
class Runtime:
    """The running process: its ranks, device and mesh, the other processes of the run on this host, the store by which
    all have met, and what each process has told (`stacks.told`)."""

    launch: Launch
    device: torch.device
    mesh: Mesh
    siblings: list[siblings.Sibling]
    store: dist.Store
    processes: list[list[Any]]

    @property
    def hosts(self) -> list[str]:
        """Of each rank."""
        return [process[0] for process in self.processes]


def choose_device(config: RunConfig, launch: Launch) -> torch.device:
    """The GPU of this process if the machine has GPUs, else the CPU.

    Raises:
        ConfigError: nccl without a GPU, or more processes on this machine than GPUs.
    """
    backend = config.parallel.distributed_backend
    if not torch.cuda.is_available():
        if backend == "nccl":
            raise ConfigError("--distributed-backend = nccl needs GPUs and torch sees none; use gloo or auto")
        return torch.device("cpu")
    if backend == "gloo":
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        error = ConfigError(f"LOCAL_RANK = {launch.local_rank}: this machine has {torch.cuda.device_count()} GPUs; "
                            "start at most one process for each (--nproc-per-node)")
        error.everywhere = False  # the first processes of a machine have one
        raise error
    return torch.device("cuda", launch.local_rank)


def start(config: RunConfig, launch: Launch) -> Runtime:
    """Join the process group, agree on the configuration, and build the mesh.

    Raises:
        ConfigError: the processes were started with different settings or versions.
    """
    device = choose_device(config, launch)
    _allow_open_files()
    if config.training.deterministic_mode:
        make_cublas_deterministic()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    if device.type == "cuda":
        prepare_accelerator()
        torch.cuda.set_device(device)
    elif config.parallel.sharding != "no_shard":
        _return_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store: dist.Store = dist.HashStore()
    if launch.init_method is not None:
        choose_interface()
        store = attempt_store(launch.init_method, launch.rank, launch.world_size + launch.spares, timeout)
    # With its device, NCCL connects at once, and does not guess a process's device from its rank.
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout,
                            device_id=device if device.type == "cuda" else None)
    agree_on_configuration(config)
    pp, tp = config.parallel.pipeline_model_parallel_size, config.parallel.tensor_model_parallel_size
    mesh = build_mesh(device.type, pp=pp, dp=launch.world_size // (pp * tp), tp=tp,
                      shard_parameters=config.parallel.sharding != "no_shard", timeout=timeout)
    processes = gather_json(stacks.told(stacks.listen()))
    return Runtime(launch, device, mesh, siblings.on_this_host(tuple(told[1:4]) for told in processes), store,
                   processes)


def _allow_open_files() -> None:
    """Let this process have as many files open as the system permits. Each of gloo's groups of all processes takes a
    connection to every one of them, and many systems start a process with room for 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sys.platform == "linux" and soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _return_freed_memory() -> None:
    """Have the C library return large blocks to the system when they are freed. By default glibc keeps blocks of up to
    32 MB and places shards and moments between them, so that sharding takes more memory than replication. Costs
    processor time, about 7% in one measurement; no effect with other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def agree_on_configuration(config: RunConfig) -> None:
    """Check that all processes run with the same settings; gloo would silently add up unrelated tensors.

    Raises:
        ConfigError: on every process, naming the settings that differ and the ranks.
    """
    facts: dict[str, Any] = {
        flag_name(key): value for section in config.to_dict().values() for key, value in section.items()}
    facts |= {"version of megatron_ltd": megatron_ltd.__version__, "version of torch": torch.__version__,
              "version of Python": platform.python_version()}
    differing = disagreements(gather_json(facts))
    if differing:
        raise ConfigError("The processes were started with different settings; start all of them with the same:\n  "
                          + "\n  ".join(differing))


def stop(*, failed: bool = False) -> None:
    """Leave the process group.

    Args:
        failed: an error has ended this process's part, and the others may be anywhere. NCCL is left together: whoever
            leaves waits for the others, and for all that it has begun with them. So this process just ends.
    """
    if not dist.is_initialized():
        return
    leaves_together = dist.get_world_size() > 1 and "nccl" in dist.get_backend_config()
    if not (failed and leaves_together):
        dist.destroy_process_group()


def describe_host() -> str:
    """Where this process runs, for the log."""
    return f"{socket.gethostname()} (Python {platform.python_version()}, torch {torch.__version__})"
