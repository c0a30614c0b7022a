"""Reads results files: this project's, and those of lm-evaluation-harness with its samples files beside them."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.harness.metrics import metrics_of, samples_of
from megatron_ltd.lm_eval.results import Samples


@dataclass(frozen=True)
class Scored:
    """The results of a task.

    Args:
        metrics: by name, the headline first; infinite where the file has null.
        samples: by metric.
        examples: which they are, as far as the file says: digest of the file, or of all examples.
    """

    metrics: dict[str, float]
    samples: dict[str, Samples] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)


def read_results(path: Path) -> dict[str, Scored]:
    """The tasks of a results file, or of the newest one in a folder of the harness's output.

    Raises:
        DataError: it is no such file.
    """
    if path.is_dir():
        found = sorted(path.rglob("results_*.json"), key=lambda file: file.name)
        if not found:
            raise DataError(f"{path} holds no results_*.json. Name a results file.")
        path = found[-1]
    record = _json(path, _text(path))
    if isinstance(record, dict) and isinstance(record.get("tasks"), dict):
        read = _ours
    elif isinstance(record, dict) and isinstance(record.get("results"), dict):
        read = _of_harness
    else:
        raise DataError(f"{path} is no results file: neither `--output FILE.json` of tools/evaluate_zeroshot.py nor "
                        "results_*.json of lm-evaluation-harness. Check the path.")
    try:
        return read(path, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}. Score again.") from error


def _ours(path: Path, record: dict[str, Any]) -> dict[str, Scored]:
    found = {}
    for task, entry in record["tasks"].items():
        metrics = {name: math.inf if metric["value"] is None else float(metric["value"])
                   for name, metric in entry["metrics"].items()}
        samples = {name: list(each) for name, each in entry.get("samples", {}).items()}
        found[task] = Scored(metrics, samples, {"file": entry["sha256"]} if entry["sha256"] else {})
    return found


def _of_harness(path: Path, record: dict[str, Any]) -> dict[str, Scored]:
    date = path.stem.rpartition("_")[2]
    found = {}
    for task, numbers in record["results"].items():
        metrics = {name: metric.value for name, metric in metrics_of(numbers).items()}
        samples_file = path.with_name(f"samples_{task}_{date}.jsonl")
        lines = _text(samples_file).split("\n")[:-1] if samples_file.is_file() else []
        examples = [_json(samples_file, line) for line in lines]
        docs = " ".join(str(example["doc_hash"]) for example in examples)
        digests = {"examples": hashlib.sha256(docs.encode()).hexdigest()} if docs else {}
        found[task] = Scored(metrics, samples_of(examples, metrics), digests)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Check the path.") from error


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}. Score again.") from error
