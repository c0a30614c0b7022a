"""A node finds its place in the environments of clusters; Slurm's script under stand-ins for its commands."""

import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.cluster import place_of_node
from megatron_ltd.errors import ConfigError
from tests.train.launchers import environment, free_port

ROOT = Path(__file__).resolve().parents[2]
KUBEFLOW = {"PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "job-node-0-0.job",
            "PET_MASTER_PORT": "29400"}
SKYPILOT = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": "4"}


def test_kubeflow_and_skypilot_tell_a_node_its_place() -> None:
    assert place_of_node(KUBEFLOW) == {"NNODES": "4", "NODE_RANK": "2", "GPUS_PER_NODE": "8",
                                       "MASTER_ADDR": "job-node-0-0.job", "MASTER_PORT": "29400"}
    assert "GPUS_PER_NODE" not in place_of_node({**KUBEFLOW, "PET_NPROC_PER_NODE": "auto"})
    assert place_of_node(SKYPILOT) == {"NNODES": "2", "NODE_RANK": "1", "GPUS_PER_NODE": "4", "MASTER_ADDR": "10.0.0.1"}


def test_what_the_user_sets_comes_first() -> None:
    assert place_of_node({**SKYPILOT, "NNODES": "1"}) == {"NNODES": "1"}
    assert place_of_node({**SKYPILOT, "GPUS_PER_NODE": "2", "MASTER_PORT": "1234"})["GPUS_PER_NODE"] == "2"
    assert place_of_node({"PATH": "/bin"}) == {}


def test_slurm_must_start_one_task_per_node() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[0-1]", "SLURM_STEP_NUM_NODES": "2",
            "SLURM_STEP_NUM_TASKS": "16"}
    with pytest.raises(ConfigError, match="16 tasks on 2 nodes.*--ntasks-per-node=1"):
        place_of_node(step)


STAND_INS = {
    # Runs a copy of the script, as Slurm does, on as many nodes as its option says.
    "sbatch": """
nodes=${1#--nodes=} folder=$(dirname "$0")
cp "$2" "$folder/slurm_script"
grep -q '^#SBATCH --requeue' "$2" && grep -q '^#SBATCH --signal=B:TERM@' "$2"
export SLURM_CPUS_PER_TASK=$(sed -n 's/^#SBATCH --cpus-per-task=//p' "$2")
SLURM_SUBMIT_DIR=$PWD SLURM_NNODES=$nodes exec bash "$folder/slurm_script" "${@:3}"
""",
    # The hosts of a list, or a note that the job is queued again.
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; echo localhost; else echo "$@" >> "$NOTES"; fi',
    "srun": """
cpus=1  # of a task, unless srun itself is asked for more
while [[ $1 == --* ]]; do
    if [[ $1 == --cpus-per-task=* ]]; then cpus=${1#*=}; fi
    shift
done
echo "$cpus processors a task" >> "$NOTES"
for node in 0 1; do
    SLURM_STEP_ID=0 SLURM_STEP_NODELIST='localhost[0-1]' SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 \\
        SLURM_NODEID=$node "$@" & tasks[node]=$!
done
code=0
for node in 0 1; do wait "${tasks[node]}" || code=$?; done
exit "$code"
""",
}


def test_the_slurm_script_runs_a_task_on_each_node_and_queues_a_stopped_job_again(tmp_path: Path) -> None:
    for name, body in STAND_INS.items():
        script = tmp_path / name
        script.write_text(f"#!/usr/bin/env bash\nset -e\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    port = next(port for port in iter(free_port, None) if port >= 20_000)  # where a job's number can lead
    variables = {**environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable,
                 "NOTES": str(tmp_path / "notes"), "SLURM_JOB_ID": str(port - 20000)}
    done = subprocess.run(
        ["sbatch", "--nodes=2", "examples/slurm_pretrain_gpt.sh", "--mock-data", "--vocab-size", "128",
         "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16",
         "--micro-batch-size", "1", "--lr", "1e-3", "--train-iters", "4", "--exit-interval", "2",
         "--save", str(tmp_path / "checkpoints")],
        env=variables, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 11, done.stdout + done.stderr
    assert "2 node(s) x 1 process(es), node 1" in done.stdout and "dp 2," in done.stdout
    assert (tmp_path / "notes").read_text() == f"64 processors a task\nrequeue {port - 20000}\n"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_manifests_start_the_same_script_with_sound_flags(path: Path) -> None:
    manifest: Any = yaml.safe_load(path.read_text())
    text = path.read_text()
    assert "examples/pretrain_gpt.sh" in text and "--save /shared/gpt --load /shared/gpt" in text.replace(",", "")
    config = ROOT / "examples" / "configs" / "gpt_1.3b.toml"
    assert config.is_file() and "examples/configs/gpt_1.3b.toml" in text
    assert manifest


def test_what_needs_a_person_is_not_tried_again_by_the_job_set() -> None:
    [job] = yaml.safe_load((ROOT / "examples" / "kubernetes" / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    [rule] = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [20, 21, 22, 30, 50]


FIELDS = json.loads((ROOT / "tests" / "fixtures" / "cluster_fields.json").read_text())
TYPES: dict[str, Any] = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list,
                         "int-or-string": (int, str)}


def misfits(value: Any, schema: Any, place: str) -> list[str]:
    """Where a manifest is not as its published schema says.

    Args:
        schema: type, fields, required ones and values, or the name of the type alone.
    """
    kind = schema if isinstance(schema, str) else schema["type"]
    if kind == "any":
        return []
    if not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
        return [f"{place} is no {kind}"]
    if isinstance(schema, str):
        return []
    found = [] if value in schema.get("enum", [value]) else [f"{place} = {value}"]
    fields = schema.get("fields")
    if fields is not None:
        found += [f"{place}.{name} is missing" for name in schema["required"] if name not in value]
        for name, inner in value.items():
            found += (misfits(inner, fields[name], f"{place}.{name}") if name in fields
                      else [f"{place}.{name} is unknown"])
    if "values" in schema:
        found += [text for name, inner in value.items() for text in misfits(inner, schema["values"], f"{place}.{name}")]
    if "items" in schema:
        found += [text for inner in value for text in misfits(inner, schema["items"], f"{place}[]")]
    return found


@pytest.mark.parametrize("name", ["jobset", "trainjob"])
def test_manifests_have_the_fields_of_the_published_schemas(name: str) -> None:
    manifest = yaml.safe_load((ROOT / "examples" / "kubernetes" / f"{name}.yaml").read_text())
    facts = FIELDS[name]
    assert (manifest["apiVersion"], manifest["kind"]) == (f"{facts['group']}/{facts['version']}", facts["kind"])
    assert misfits(manifest, facts["schema"], name) == []
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["elasticPolicy"] = {}
    assert misfits(wrong, facts["schema"], name) == [f"{name}.spec.elasticPolicy is unknown"]


def test_the_task_for_skypilot_has_the_fields_of_the_published_schema() -> None:
    task = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    assert misfits(task, FIELDS["skypilot"]["schema"], "task") == []
    task["resources"]["job_recovery"]["recover_on_exit_codes"] = ["10"]
    assert misfits(task, FIELDS["skypilot"]["schema"], "task") == [
        "task.resources.job_recovery.recover_on_exit_codes[] is no integer"]


def test_a_wrong_type_value_or_missing_field_of_a_manifest_is_found() -> None:
    manifest = yaml.safe_load((ROOT / "examples" / "kubernetes" / "jobset.yaml").read_text())
    manifest["spec"]["failurePolicy"]["maxRestarts"] = "100"
    [job] = manifest["spec"]["replicatedJobs"]
    job["template"]["spec"]["podFailurePolicy"]["rules"][0].pop("action")
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    assert len(misfits(manifest, FIELDS["jobset"]["schema"], "jobset")) == 3
