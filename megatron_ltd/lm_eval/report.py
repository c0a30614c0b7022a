"""Results of an evaluation as JSON, as a Markdown table, and as CSV."""

import csv
import hashlib
import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatron_ltd
from megatron_ltd.checkpoint.durable import write_file
from megatron_ltd.checkpoint.manifest import Manifest
from megatron_ltd.checkpoint.saved_settings import saved_config
from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.results import Metric, TaskResult
from megatron_ltd.lm_eval.table import number, table
from megatron_ltd.train.state import TrainState

NUMBERS = re.compile(r"\[\n[-+.,\s\deEnul\[\]]*\n *\](?=[,\n])")
FORMATS = (".json", ".md", ".csv")
CSV_HEAD = ["load", "step", "consumed_tokens", "consumed_layer_tokens", "task", "metric", "value", "stderr", "n",
            "unit", "truncated", "num_fewshot", "file", "sha256"]


def model_record(load: str, manifest: Manifest) -> dict[str, Any]:
    """Which model was scored, and on how much it was trained."""
    consumed = TrainState.from_counters(manifest.counters).consumed
    layers = saved_config(manifest, Path(load)).model.num_layers
    return {
        "load": load,
        "step": manifest.step,
        "consumed_samples": consumed.samples,
        "consumed_tokens": consumed.tokens,
        "consumed_layer_tokens": consumed.layer_tokens(layers),
    }


def model_sha256(manifest: Manifest) -> str:
    """SHA-256 of a model's settings and of the digests of its files: another model may have its folder and step."""
    files = {name: facts.sha256 for name, facts in manifest.files.items()}
    return hashlib.sha256(json.dumps([manifest.config["model"], files], sort_keys=True).encode()).hexdigest()


def task_record(name: str, path: Path, sha256: str, result: TaskResult, *, with_samples: bool) -> dict[str, Any]:
    """One task's part of the results file; a number that is not finite becomes null, as JSON has no word for it.

    Args:
        name: of the task as it was listed; a group has several results.
        with_samples: with what each example adds to each metric.
    """
    return {
        "metrics": {
            name: {"value": _finite(metric.value), "stderr": _finite(metric.stderr)}
            for name, metric in result.metrics.items()
        },
        "n": result.n,
        "unit": result.unit,
        "truncated": result.truncated,
        "counts": result.counts,
        "protocol": result.protocol,
        **({} if result.num_fewshot is None else {"num_fewshot": result.num_fewshot}),
        **({} if result.version is None else {"version": result.version}),
        "notes": list(result.notes),
        "listed_as": name,
        "file": str(path),
        "sha256": sha256,
        **({"samples": {name: [_finite(one) for one in each] for name, each in result.samples.items()}}
           if with_samples else {}),
    }


def result_of(entry: dict[str, Any]) -> TaskResult:
    """The result that `task_record` wrote."""
    metrics = {name: Metric(math.inf if metric["value"] is None else metric["value"], metric["stderr"])
               for name, metric in entry["metrics"].items()}
    return TaskResult(metrics, entry["n"], entry["unit"], entry["truncated"], entry["protocol"], entry["counts"],
                      tuple(entry["notes"]), entry.get("samples", {}), entry.get("num_fewshot"), entry.get("version"))


def finished_before(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The tasks of a results file that the same command has written, as far as they are whole; none if there is no such
    file."""
    if path.suffix != ".json" or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    same = isinstance(found, dict) and all(
        found.get(part) == record[part]
        for part in ("model", "model_sha256", "tokenizer_digest", "options", "versions"))
    tasks = found.get("tasks") if same else None
    return {name: entry for name, entry in tasks.items() if _is_whole(entry)} if isinstance(tasks, dict) else {}


def _is_whole(entry: Any) -> bool:
    try:
        result_of(entry)
        return {"listed_as", "file", "sha256"} <= entry.keys()
    except (KeyError, TypeError, AttributeError):
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value if value is not None and math.isfinite(value) else None


def software_versions() -> dict[str, str]:
    """What computed the numbers."""
    return {
        "megatron_ltd": megatron_ltd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "tokenizers": version("tokenizers"),
    }


def check_writable(path: Path) -> None:
    """Find out before hours of work that its results cannot be written.

    Raises:
        DataError: the folder is missing or read-only, or the path is a folder.
    """
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"--output = {path} cannot be written: it must be a file in an existing, writable folder.")


def check_format(path: Path) -> None:
    """Find out before hours of scoring that the suffix names no format.

    Raises:
        DataError: the suffix stands for no format.
    """
    if path.suffix not in FORMATS:
        raise DataError(f"--output = {path}: the suffix says how results are written. Use one of {', '.join(FORMATS)}.")


def write_results(path: Path, record: dict[str, Any], results: dict[str, TaskResult],
                  failed: Mapping[str, Exception]) -> None:
    """Write the results in the format of the suffix, so that a reader never sees half a file."""
    if path.suffix == ".md":
        text = markdown_table(results, failed) + "\n"
    elif path.suffix == ".csv":
        text = csv_table(record)
    else:
        # Lists of numbers in a line each; texts have no line ends in JSON.
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        text = NUMBERS.sub(lambda numbers: " ".join(numbers[0].split()), text)
    write_file(path, text.encode(errors="backslashreplace"))  # names of files need not be text


def csv_table(record: dict[str, Any]) -> str:
    """One line for each metric of each task, with the model that was scored."""
    table = io.StringIO()
    writer = csv.DictWriter(table, CSV_HEAD, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for task, entry in record["tasks"].items():
        for name, metric in entry["metrics"].items():
            writer.writerow(record["model"] | record["options"] | entry | metric | {"task": task, "metric": name})
    return table.getvalue()


def markdown_table(results: dict[str, TaskResult], failed: Mapping[str, Exception]) -> str:
    """One row for each metric of each task and each that failed, names to the left and numbers to the right.

    What is to be told of a task stands below, and why it failed.
    """
    rows = [("task", "metric", "value", "stderr", "n", "truncated")]
    rows += [(task, name, number(metric.value), number(metric.stderr), f"{result.n} {result.unit}",
              str(result.truncated))
             for task, result in results.items() for name, metric in result.metrics.items()]
    rows += [(task, "failed", "-", "-", "-", "-") for task in failed]
    told = [f"{task}: {note.removeprefix(f'{task}: ')}" for task, result in results.items() for note in result.notes]
    told += [f"{task} failed: {type(error).__name__}: {error}" for task, error in failed.items()]
    return "\n".join([table(rows, "<<>>>>"), *([""] if told else []), *(f"- {line}" for line in told)])
