"""Start one recipe on this node, with torch's launcher in this process, and end as the run ended.

    python examples/launch.py RECIPE ARGUMENTS        RECIPE: a module of megatron_ltd, such as pretrain_gpt

The settings are checked first, before torch is imported. torch's launcher ends with 1 and a report of a crash whatever
happened; here the exit code is that of the run, the run's own message comes last, and only a crash is reported as one.
The environment is described in `examples/pretrain_gpt.sh`.
"""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from examples.cluster import place_of_node
from examples.ending import completed_since, conclude, endings_in, record_crash
from examples.meeting import Place, meet
from megatron_ltd import finetune_gpt, finetune_vit, pretrain_bert, pretrain_gpt
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import EXIT_COMPLETE, ConfigError
from megatron_ltd.log import Console
from megatron_ltd.plan.derived import global_batch_size
from megatron_ltd.settings.cli import asks_for_help
from megatron_ltd.train.process.environment import MOST_PROCESSES, Launch
from megatron_ltd.train.process.network import is_loopback, notice_silence, own_address

RECIPES = {"pretrain_gpt": pretrain_gpt.RECIPE, "pretrain_bert": pretrain_bert.RECIPE,
           "finetune_gpt": finetune_gpt.RECIPE, "finetune_vit": finetune_vit.RECIPE}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
RENDEZVOUS = "last_call_timeout=3,join_timeout=60,read_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=5"
"""Of an elastic run: a node that is silent for 5 seconds is lost; the others wait for it for 3. Nodes that are too few
look after 60 whether others have met elsewhere; torch takes up to 30 to stop the processes for a node that joins."""
RESTARTS = 1_000_000


@dataclass(frozen=True)
class Node:
    """This node's part of the run.

    Args:
        nodes: of the run, at most.
        least: the fewest nodes with which an elastic run goes on; None for a run of a fixed number.
        places: where the launchers meet, in the order in which hosts take over.
    """

    nodes: int
    least: int | None
    number: int
    processes: int
    places: tuple[Place, ...]

    @classmethod
    def from_environment(cls) -> "Node":
        """Raises:
            ConfigError: a variable has a value that cannot be.
        """
        told = place_of_node(os.environ)
        least, colon, most = told.get("NNODES", "1").rpartition(":")
        nodes = _number(told, "NNODES", most, 1, None, "must be a positive number, or MIN:MAX")
        fewest = None
        if colon:
            fewest = _number(told, "NNODES", least, 1, nodes, f"must be MIN:MAX with MIN from 1 to {nodes}")
        number = _number(told, "NODE_RANK", "0", 0, nodes - 1, f"must be between 0 and NNODES - 1 = {nodes - 1}")
        port = _number(told, "MASTER_PORT", "29500", 1, 65535, "must be a port number, 1 to 65535")
        address, hosts = told.get("MASTER_ADDR"), told.get("RDZV_HOSTS")
        if fewest is not None and not hosts and not address:
            raise ConfigError(f"RDZV_HOSTS is not set; NNODES = {fewest}:{nodes} needs the hosts at which the nodes "
                              "may meet, separated by commas, the same on every node")
        if fewest is None and nodes > 1 and not address:
            raise ConfigError(f"MASTER_ADDR is not set; NNODES = {nodes} needs the host name of the node with "
                              "NODE_RANK 0, on every node")
        places = tuple(Place.read(host, port) for host in (hosts if fewest and hosts else address or "").split(",")
                       if nodes > 1 or fewest)
        if fewest is None and nodes > 1 and number == 0 and not places[0].is_free():
            raise ConfigError(f"MASTER_PORT = {places[0].port}: another program has this port on this host; choose "
                              "another one on every node")
        processes = _number(told, "GPUS_PER_NODE", str(gpus() or 1), 1, None, "must be a positive number")
        return cls(nodes, fewest, number, processes, places)

    @property
    def most_processes(self) -> int:
        """Of the run."""
        return self.nodes * self.processes

    def launcher_arguments(self) -> list[str]:
        """torchrun's; those of an elastic run wait until the launchers have met."""
        words = ["--nproc-per-node", str(self.processes)]
        if self.least is not None:
            place, is_host = meet(self.places)
            Console().line(f"{'hosting the meeting' if is_host else 'joining the others'} at {place}; the run goes on "
                           f"with {self.least} to {self.nodes} nodes")
            hosts = [other.host for other in self.places if other.host != "localhost" and not is_loopback(other.host)]
            own = own_address(hosts) if hosts else None  # on one machine, all have its name
            if own is not None:
                words += ["--local-addr", own]  # by default its name, which the others may not know
            return [*words, "--nnodes", f"{self.least}:{self.nodes}", "--rdzv-backend", "c10d", "--rdzv-id",
                    "megatron_ltd", "--rdzv-endpoint", str(place),
                    "--rdzv-conf", f"is_host={int(is_host)},{RENDEZVOUS}",
                    "--max-restarts", str(RESTARTS), "--monitor-interval", "0.5"]
        words += ["--nnodes", str(self.nodes)]
        if self.nodes == 1:
            return [*words, "--standalone"]
        [place] = self.places
        return [*words, "--node-rank", str(self.number), "--master-addr", place.host, "--master-port", str(place.port)]


def _number(told: dict[str, str], name: str, otherwise: str, low: int, high: int | None, constraint: str) -> int:
    text = otherwise if name == "NNODES" else told.get(name, otherwise)
    if not text.isascii() or not text.isdigit() or int(text) < low or (high is not None and int(text) > high):
        raise ConfigError(f"{name} = {told.get(name)} {constraint}")
    return int(text)


def gpus() -> int:
    """The GPUs that torch would see, asked of the driver: torch takes seconds to import."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def arguments_of_run(given: list[str]) -> list[str]:
    """The recipe's arguments, with the file that CONFIG names.

    Raises:
        ConfigError: it cannot be read, or there is nothing to train.
    """
    config = os.environ.get("CONFIG")
    if config and not os.access(config, os.R_OK):
        raise ConfigError(f"CONFIG = {config} cannot be read; the examples are in {Path(__file__).parent / 'configs'}")
    if not config and not given:
        raise ConfigError("nothing to train: set CONFIG to a file such as examples/configs/*.toml, or give flags; see "
                          "--help")
    return ["--config", config, *given] if config else given


def with_global_batch(config: RunConfig, arguments: list[str], node: Node) -> list[str]:
    """The arguments with the global batch, which would otherwise follow the number of processes and change with it."""
    if config.training.global_batch_size is not None:
        return arguments
    batch = global_batch_size(config, node.most_processes // (config.parallel.tensor_model_parallel_size
                                                              * config.parallel.pipeline_model_parallel_size))
    Console().line(f"--global-batch-size {batch}, as {node.nodes} nodes would have it; it stays when nodes come and go")
    return [*arguments, "--global-batch-size", str(batch)]


def run(recipe: str, arguments: list[str], node: Node, save: str | None) -> int:
    """Run the processes of this node and return the exit code of the run.

    Args:
        save: the run's folder of checkpoints.
    """
    from examples.standby import Standby  # imports torch; only here: the settings are sound

    # torch reports every stop as a crash, in its log and when it ends. What a crash needs is printed below.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    started, module = time.time(), f"megatron_ltd.{recipe}"
    with ExitStack() as meanwhile:
        meanwhile.enter_context(noticing_silence(node.places))
        if node.least is not None:  # only then are there further attempts
            meanwhile.enter_context(Standby(module, node.processes))
        while True:
            with tempfile.TemporaryDirectory(prefix="megatron_ltd_") as folder:
                crash, apart = launch(["-m", module, *arguments], node, folder)
                endings = endings_in(Path(folder))
            if node.least is None or not apart:
                code = conclude(endings, crash, node.processes)
                if code != EXIT_COMPLETE and len(endings) < node.processes and save is not None:
                    record_crash(save, code, crash)
                return code
            if save is not None and completed_since(save, started):
                Console().line("the other nodes have completed the run")
                return EXIT_COMPLETE
            Console().line("the nodes have not met, or have lost the one at which they did; looking for them again")


def launch(command: list[str], node: Node, folder: str) -> tuple[str, bool]:
    """Run this command with torch's launcher until it is over.

    Args:
        folder: for what the processes tell.

    Returns:
        torch's report of a crash, or an empty string; and whether the nodes did not meet, or no longer do.
    """
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    heeded = [number.name for number in SIGNALS
              if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    try:
        torchrun.run(torchrun.parse_args([*node.launcher_arguments(), "--log-dir", folder, "--signals-to-handle",
                                          ",".join(heeded), *command]))
    except ChildFailedError as error:
        return str(error), False
    except SignalException as error:
        return f"stopped by {signal.Signals(error.sigval).name} before the run could save", False
    except RendezvousClosedError:
        Console().line("the other nodes have ended the run")
    except (DistError, RendezvousError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        return f"the nodes did not meet at {', '.join(map(str, node.places))}: {said}", True
    return "", False


@contextmanager
def noticing_silence(places: tuple[Place, ...]) -> Iterator[None]:
    """Meanwhile this process notices within seconds that the host at which all met has vanished."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            for port in {place.port for place in places}:
                notice_silence(port)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def main() -> int:
    recipe, *given = sys.argv[1:] or [""]
    if recipe not in RECIPES:
        Console().error(f"examples/launch.py: give one of {', '.join(RECIPES)}, and its arguments")
        return ConfigError.exit_code
    if asks_for_help(given):
        return RECIPES[recipe].main(given, Launch(), only_check=True)
    try:
        node, arguments = Node.from_environment(), arguments_of_run(given)
    except ConfigError as error:
        Console().error(f"examples/{recipe}.sh: {error}.")
        return error.exit_code
    code = RECIPES[recipe].main(arguments, Launch(world_size=node.most_processes), only_check=True)
    if code != EXIT_COMPLETE:
        return code
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = RECIPES[recipe].read_settings(arguments, Console(False), node.most_processes)
    if node.least is not None:
        os.environ[MOST_PROCESSES] = str(node.most_processes)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # with it a node that joins never learns where to meet
        arguments = with_global_batch(config, arguments, node)
    Console().line(f"{node.nodes} node(s) x {node.processes} process(es), node {node.number}, "
                   f"{os.environ.get('CONFIG') or 'no configuration file'}")
    return run(recipe, arguments, node, config.checkpoint.save)


if __name__ == "__main__":
    sys.exit(main())
