"""The run of examples/pretrain_gpt.sh under Ray Train: one worker on each node, which starts the processes of its node.

    python examples/ray_train.py --nodes 4 --processes 8 --gpus 8 -- --data-path /data/corpus_text_document \\
        --vocab-file /data/vocab.json --merge-file /data/merges.txt \\
        --save-interval 500 --save /shared/gpt --load /shared/gpt

Needs `ray[train]` (tried with 2.60), and this repository and the files under the same paths on all nodes. CONFIG and
PYTHON are taken from this program's environment. Exit codes 0, 20, 21, 22, 30 and 50 end the run; after every other,
or a lost node, Ray starts the workers again and the run continues from its newest checkpoint. This program ends with
the run's exit code.
"""

import argparse
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

SCRIPT = Path(__file__).resolve().parent / "pretrain_gpt.sh"
FOR_GOOD = (0, 20, 21, 22, 30, 50)
"""Exit codes after which another start would end the same way."""
_PR_SET_PDEATHSIG = 1


def work(settings: dict[str, Any]) -> int:
    """What the worker of a node does; returns the exit code of a run that has ended for good.

    Raises:
        RuntimeError: the run has ended in a way that another start may help; Ray then starts all workers again.
    """
    context = ray.train.get_context()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    meeting = broadcast_from_rank_zero({"MASTER_ADDR": ray.util.get_node_ip_address(), "MASTER_PORT": str(port)})
    place = {"NNODES": str(context.get_world_size()), "NODE_RANK": str(context.get_world_rank()),
             "GPUS_PER_NODE": str(settings["processes"])}
    run = subprocess.Popen(["bash", str(SCRIPT), *settings["flags"]], cwd=settings["folder"],
                           env={**os.environ, **settings["variables"], **meeting, **place}, preexec_fn=_end_with_parent)
    code = run.wait()
    if code not in FOR_GOOD:
        raise RuntimeError(f"the run ended with exit code {code}")
    return code


def _end_with_parent() -> None:
    """Let the run save and end if Ray ends its worker."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="on each node")
    parser.add_argument("--gpus", type=int, default=0, help="on each node")
    parser.add_argument("--restarts", type=int, default=100, help="of all workers, at most")
    parser.add_argument("--storage", default=None, help="Ray's own records; a folder that all nodes share")
    parser.add_argument("flags", nargs="*", help="the run's, after --")
    options = parser.parse_args()
    settings = {"flags": options.flags, "processes": options.processes, "folder": os.getcwd(),
                "variables": {name: os.environ[name] for name in ("CONFIG", "PYTHON") if name in os.environ}}
    resources = {"CPU": 1.0, "GPU": float(options.gpus)}
    trainer = DataParallelTrainer(
        work, train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=options.nodes, use_gpu=options.gpus > 0,
                                     resources_per_worker=resources, placement_strategy="SPREAD"),
        run_config=RunConfig(storage_path=options.storage, failure_config=FailureConfig(max_failures=options.restarts)))
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        codes = re.findall(r"ended with exit code (-?\d+)", str(error))
        print(f"examples/ray_train.py: {options.restarts} restarts did not help: {error}", file=sys.stderr)
        return int(codes[-1]) if codes else 1
    assert result.return_value is not None
    return int(result.return_value)


if __name__ == "__main__":
    sys.exit(main())
