"""What torchrun and this process tell each other: the environment in, the reason for the exit out. No other module
reads the environment."""

import json
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from megatron_ltd.errors import EXIT_PEER_LOST, ConfigError
from megatron_ltd.log import Console
from megatron_ltd.train.process.network import addresses_of, interface_of, is_loopback, own_address

MOST_PROCESSES = "MEGATRON_LTD_MOST_PROCESSES"
"""Set by `examples/launch.py` for an elastic run."""


@dataclass(frozen=True)
class Launch:
    """This process's place among those that were started together.

    Args:
        world_size: the processes that train; ranks from there on are spares.
        init_method: their rendezvous address; None for a single process without a launcher.
        spares: processes that were started and do not train, since so many do not fit the settings.
        most: the largest number of processes of an elastic run; None for one whose nodes do not come and go.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    init_method: str | None = None
    spares: int = 0
    most: int | None = None

    @classmethod
    def from_environment(cls) -> "Launch":
        """The values set by torchrun; without it, a single process.

        Raises:
            ConfigError: the variables are incomplete or not numbers.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, local_rank, world_size = (int(os.environ[name]) for name in names)
        except (KeyError, ValueError) as error:
            found = ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in names)
            raise ConfigError(f"{found}: a launcher must set all three to numbers; start with torchrun") from error
        most = os.environ.get(MOST_PROCESSES)
        return cls(rank, local_rank, world_size, "env://", most=int(most) if most else None)


def store_port(init_method: str) -> int | None:
    """The port of the store at which the processes meet; None if it is a file, or none that torch would accept."""
    address = urlsplit(init_method)
    port = os.environ.get("MASTER_PORT", "") if address.scheme == "env" else str(address.port)
    return int(port) if port.isdecimal() else None


def tell_launcher(code: int, reason: str, *, printed: bool) -> None:
    """Leave the exit code and the reason in the file that torchrun names for it. torchrun prints the reason as the
    "Root Cause"; `examples/launch.py` reads the code.

    Args:
        printed: whether this process has printed the reason.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # torchrun takes the earliest second for the root cause; an effect of another failure must come after it.
    timestamp = int(time.time()) + (code == EXIT_PEER_LOST)
    message = {"message": reason, "errorCode": code, "printed": printed, "extraInfo": {"timestamp": str(timestamp)}}
    try:
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError as error:
        Console().warn(f"{path} could not be written: {error}")


def make_cublas_deterministic() -> None:
    """Set what cuBLAS needs to be deterministic, unless the user has set it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_interface() -> None:
    """Have gloo use the interface that leads to the other hosts, unless the user has set one. By default it uses that
    of this host's name, and on many systems a host's name stands for the loopback address."""
    master = os.environ.get("MASTER_ADDR", "")
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if not several or "GLOO_SOCKET_IFNAME" in os.environ or master == "localhost" or is_loopback(master):
        return
    if all(is_loopback(address) for address in addresses_of(socket.gethostname())):
        address = own_address([master])
        interface = None if address is None else interface_of(address)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def prepare_accelerator() -> None:
    """Set what torch reads when it first uses a GPU, unless the user has set it: memory in segments that grow, since
    blocks of many sizes, as while the kept length changes, would not fit into the gaps; and a record of the last
    collectives, written when one of them times out."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def end_restarts(launch: Launch) -> None:
    """Keep the launcher from starting the run again after an end that no attempt can change. It restarts after any exit
    code but 0, and only a signal to it ends that."""
    attempt, limit = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if launch.local_rank == 0 and attempt < limit and (launch.most is not None or _is_torchrun(os.getppid())):
        os.kill(os.getppid(), signal.SIGTERM)


def _is_torchrun(process: int) -> bool:
    """Whether a process runs torch's launcher; False where there is no /proc."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word == b"torch.distributed.run" or word.endswith((b"/torchrun", b"torch/distributed/run.py"))
               for word in command)


@dataclass(frozen=True)
class StatusServer:
    """Where Kubeflow Trainer 2.2 or later wants the progress of a TrainJob (Kubeflow's enhancement proposal 2779).

    Args:
        authority: file of the certificates to trust; empty: the system's.
        token: file of what to show, which is renewed now and then; empty: nothing.
    """

    url: str
    authority: str = ""
    token: str = ""

    @classmethod
    def from_environment(cls) -> "StatusServer | None":
        told = [os.environ.get(f"KUBEFLOW_TRAINER_SERVER_{name}", "") for name in ("URL", "CA_CERT", "TOKEN")]
        return cls(*told) if told[0] else None
