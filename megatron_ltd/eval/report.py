"""Results of an evaluation as JSON, as a Markdown table, and as CSV."""

import csv
import io
import json
import math
import os
import platform
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
from megatron_ltd.eval.results import TaskResult
from megatron_ltd.train.state import TrainState

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


def task_record(path: Path, sha256: str, result: TaskResult) -> dict[str, Any]:
    """One task's part of the results file; a number that is not finite becomes null, as JSON has no word for it."""
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
        "file": str(path),
        "sha256": sha256,
    }


def _finite(value: float | None) -> float | None:
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


def write_results(path: Path, record: dict[str, Any], results: dict[str, TaskResult]) -> None:
    """Write the results in the format of the suffix, so that a reader never sees half a file."""
    if path.suffix == ".md":
        text = markdown_table(results) + "\n"
    elif path.suffix == ".csv":
        text = csv_table(record)
    else:
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_file(path, text.encode())


def csv_table(record: dict[str, Any]) -> str:
    """One line for each metric of each task, with the model that was scored."""
    table = io.StringIO()
    writer = csv.DictWriter(table, CSV_HEAD, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for task, entry in record["tasks"].items():
        for name, metric in entry["metrics"].items():
            writer.writerow(record["model"] | record["options"] | entry | metric | {"task": task, "metric": name})
    return table.getvalue()


def markdown_table(results: dict[str, TaskResult]) -> str:
    """One row for each metric of each task, with names aligned to the left and numbers to the right."""
    rows = [("task", "metric", "value", "stderr", "n", "truncated")]
    rows += [(task, name, _number(metric.value), _number(metric.stderr), f"{result.n} {result.unit}",
              str(result.truncated))
             for task, result in results.items() for name, metric in result.metrics.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip("<<>>>>", widths, strict=True))
    lines = ["| " + " | ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)) + " |"
             for row in rows]
    rule = "|".join("-" * (width + 1) + ("-" if side == "<" else ":") for side, width in columns)
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"
