"""What a cluster tells a node about its place, under the names of this project.

The variables of the launch scripts come first. Those that are not set follow from the environment of Kubeflow Trainer
(`PET_*`, which torchrun reads too), SkyPilot, or a Slurm step with one task per node.
"""

import subprocess
from collections.abc import Mapping

from megatron_ltd.errors import ConfigError

NAMES = ("NNODES", "NODE_RANK", "GPUS_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RDZV_HOSTS")
_KUBEFLOW = {"NNODES": "PET_NNODES", "NODE_RANK": "PET_NODE_RANK", "GPUS_PER_NODE": "PET_NPROC_PER_NODE",
             "MASTER_ADDR": "PET_MASTER_ADDR", "MASTER_PORT": "PET_MASTER_PORT"}
_SKYPILOT = {"NODE_RANK": "SKYPILOT_NODE_RANK", "GPUS_PER_NODE": "SKYPILOT_NUM_GPUS_PER_NODE"}
_SLURM = {"NNODES": "SLURM_NNODES", "NODE_RANK": "SLURM_NODEID", "GPUS_PER_NODE": "SLURM_GPUS_ON_NODE"}


def place_of_node(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the launch scripts.

    Raises:
        ConfigError: Slurm has started more than one task on a node, or its list of nodes cannot be read.
    """
    given = {name: environment[name] for name in NAMES if environment.get(name)}
    if "NNODES" in given or "NODE_RANK" in given:
        return given
    return _of_cluster(environment) | given


def _of_cluster(environment: Mapping[str, str]) -> dict[str, str]:
    def renamed(names: Mapping[str, str]) -> dict[str, str]:
        return {ours: environment[theirs] for ours, theirs in names.items() if environment.get(theirs)}

    if environment.get("PET_NNODES"):
        found = renamed(_KUBEFLOW)
        if not found.get("GPUS_PER_NODE", "").isdigit():  # auto, gpu, cpu: as without it
            found.pop("GPUS_PER_NODE", None)
        return found
    if environment.get("SKYPILOT_NODE_IPS"):
        hosts = environment["SKYPILOT_NODE_IPS"].split()
        found = renamed(_SKYPILOT) | {"NNODES": str(len(hosts)), "MASTER_ADDR": hosts[0]}
        return {name: value for name, value in found.items() if (name, value) != ("GPUS_PER_NODE", "0")}
    if environment.get("SLURM_STEP_ID") and environment.get("SLURM_STEP_NODELIST"):
        return renamed(_SLURM) | _slurm_address(environment)
    return {}


def _slurm_address(environment: Mapping[str, str]) -> dict[str, str]:
    tasks, nodes = environment.get("SLURM_STEP_NUM_TASKS", ""), environment.get("SLURM_STEP_NUM_NODES", "")
    if tasks != nodes:
        raise ConfigError(f"Slurm has started {tasks} tasks on {nodes} nodes; the launch scripts start the processes "
                          "of a node themselves: srun --ntasks-per-node=1")
    listed = environment["SLURM_STEP_NODELIST"]
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"scontrol cannot expand SLURM_STEP_NODELIST = {listed}: {error}; set MASTER_ADDR and "
                          "NODE_RANK") from error
    return {"NNODES": nodes, "MASTER_ADDR": hosts.stdout.split()[0],
            "MASTER_PORT": str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 10000)}
