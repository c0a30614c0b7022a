"""Reads results files: this project's, and those of lm-evaluation-harness with its samples files beside them."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.harness.metrics import metrics_of, samples_of
from megatron_ltd.lm_eval.results import Samples

COMMON_OPTIONS = {"limit": "limit", "num_fewshot": "solved examples", "version": "task version",
                  "bos_token_id": "beginning-of-text token", "overlong": "overlong"}
OUR_OPTIONS = COMMON_OPTIONS | {"protocol": "protocol"}
HARNESS_OPTIONS = COMMON_OPTIONS | {
    "add_bos_token": "add_bos_token", "max_length": "max_length", "chat_template_sha": "chat template",
    "system_instruction_sha": "system instruction", "fewshot_as_multiturn": "solved examples as turns",
    "gen_kwargs": "generation", "fewshot_seed": "seed of solved examples"}
"""Options that change numbers, as results files name them and as they are told."""


@dataclass(frozen=True)
class Scored:
    """The results of a task.

    Args:
        metrics: by name, the headline first; infinite where the file has null.
        samples: by metric.
        examples: which they are, as far as the file says: digest of the file, or of all examples.
        made_with: options that change numbers, by name, as far as the file says.
    """

    metrics: dict[str, float]
    samples: dict[str, Samples] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)

    def unlike(self, other: "Scored") -> list[str]:
        """The options that the two were not made alike with, where both files say, and whether the examples differ."""
        found = [f"{name} {value}, {other.made_with[name]}" for name, value in self.made_with.items()
                 if other.made_with.get(name, value) != value]
        return found + ["other examples"] * self.has_other_examples_than(other)

    def has_other_examples_than(self, other: "Scored") -> bool:
        return self.examples.keys() == other.examples.keys() and self.examples != other.examples


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
    # How many solved examples a task was shown, if it can have any, stands with the task.
    options = {name: value for name, value in record.get("options", {}).items() if name != "num_fewshot"}
    for task, entry in record["tasks"].items():
        metrics = {name: math.inf if metric["value"] is None else float(metric["value"])
                   for name, metric in entry["metrics"].items()}
        samples = {name: list(each) for name, each in entry.get("samples", {}).items()}
        found[task] = Scored(metrics, samples, {"file": entry["sha256"]} if entry["sha256"] else {},
                             _made_with(OUR_OPTIONS, options | entry))
    return found


def _of_harness(path: Path, record: dict[str, Any]) -> dict[str, Scored]:
    date = path.stem.rpartition("_")[2]
    config = record.get("config", {})
    arguments = _arguments(config["model_args"]) if "model_args" in config else {}
    found = {}
    for task, numbers in record["results"].items():
        metrics = {name: metric.value for name, metric in metrics_of(numbers).items()}
        samples_file = path.with_name(f"samples_{task}_{date}.jsonl")
        lines = _text(samples_file).split("\n")[:-1] if samples_file.is_file() else []
        examples = [_json(samples_file, line) for line in lines]
        docs = " ".join(str(example["doc_hash"]) for example in examples)
        digests = {"examples": hashlib.sha256(docs.encode()).hexdigest()} if docs else {}
        own = {"num_fewshot": record.get("n-shot", {}).get(task), "version": record.get("versions", {}).get(task)}
        settings = {**arguments, **config, **record, **{name: one for name, one in own.items() if one is not None}}
        found[task] = Scored(metrics, samples_of(examples, metrics), digests, _made_with(HARNESS_OPTIONS, settings))
    return found


def _made_with(options: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        if isinstance(value, float) and value.is_integer():  # the harness's limit
            value = int(value)
        return "not given" if value is None else str(value)

    return {told: text(settings[name]) for name, told in options.items() if name in settings}


def _arguments(given: Any) -> dict[str, Any]:
    """The harness's --model_args, of which those count that change numbers; not given where they are not there."""
    if isinstance(given, str):
        given = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    return {name: (given or {}).get(name) for name in ("add_bos_token", "max_length")}


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
