"""Runs tasks of lm-evaluation-harness, on local files in place of downloads where there are any."""

import hashlib
import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError
from megatron_ltd.eval.results import EvalOptions, Metric, TaskResult
from megatron_ltd.eval.scorer import ModelScorer
from megatron_ltd.eval.tasks.names import TaskRun
from megatron_ltd.eval.tasks.task_files import sha256_of

SUFFIXES = {".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json", ".json": "json", ".parquet": "parquet"}
"""Of local files, and who reads them."""
GROUP = "chosen"
BOOTSTRAP_SAMPLES = 1000
"""For standard errors that have no formula."""


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, with the files of its splits if they are local."""

    name: str
    splits: dict[str, Path]

    @property
    def folder(self) -> Path:
        return next(iter(self.splits.values())).parent if self.splits else Path("hub")

    @property
    def sha256(self) -> str:
        """Of the digests of its files, in order of name."""
        parts = [f"{split} {sha256_of(path)}" for split, path in sorted(self.splits.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def definition(self) -> str | dict[str, Any]:
        """What the harness is told to load: inside a group, settings are laid over those of the task of that name."""
        if not self.splits:
            return self.name
        kind = {SUFFIXES[_suffix(path)] for path in self.splits.values()}
        files = {split: str(path) for split, path in self.splits.items()}
        return {"task": self.name, "dataset_path": kind.pop(), "dataset_name": None,
                "dataset_kwargs": {"data_files": files}}


def _suffix(path: Path) -> str:
    return path.name[path.name.index("."):]


def plan_harness(listed: str, folder: Path | None) -> list[HarnessTask]:
    """The tasks of a comma-separated list, with the files `folder`/TASK/SPLIT.jsonl.

    Raises:
        ConfigError: the harness is not installed, or a task's files are of two kinds.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness needs lm-evaluation-harness: pip install 'megatron_ltd[eval]'.")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--tasks = {listed!r}: name every task of the harness once.")
    tasks = []
    for name in names:
        found = [] if folder is None else sorted((folder / name).glob("*.*"))
        task = HarnessTask(name, {path.name.split(".")[0]: path for path in found if _suffix(path) in SUFFIXES})
        if len({SUFFIXES[_suffix(path)] for path in task.splits.values()}) > 1:
            raise ConfigError(f"{task.folder} holds files of two kinds; keep .jsonl and .json, or .parquet.")
        tasks.append(task)
    return tasks


def run_harness(tasks: list[HarnessTask], scorer: ModelScorer, tokenizer: Tokenizer, options: EvalOptions,
                num_fewshot: int | None) -> list[TaskRun]:
    """Score the tasks; returns runs that hold their results, in the harness's order, groups before their parts.

    Args:
        num_fewshot: None for each task's own.
    """
    model = importlib.import_module("megatron_ltd.eval.harness.model").HarnessModel(
        scorer, tokenizer, bos=options.bos, show_progress=options.show_progress)
    found = importlib.import_module("lm_eval.evaluator").simple_evaluate(
        model=model, tasks=[{"group": GROUP, "task": [task.definition() for task in tasks]}], num_fewshot=num_fewshot,
        limit=options.limit, bootstrap_iters=BOOTSTRAP_SAMPLES)
    sources = {task.name: task for task in tasks}
    runs = []
    for name, numbers in found["results"].items():
        if name != GROUP:
            result, source = _result(name, numbers, found, model.truncated), sources.get(name)
            runs.append(TaskRun(name, lambda *_, result=result: result, source.folder if source else Path("hub"),
                                source.sha256 if source else ""))
    return runs


def _result(name: str, numbers: dict[str, Any], found: dict[str, Any], truncated: int) -> TaskResult:
    metrics = {}
    for key, value in numbers.items():
        metric, _, rule = key.partition(",")
        if rule and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = numbers.get(f"{metric}_stderr,{rule}")
            shown = metric if rule == "none" else f"{metric} ({rule})"
            metrics[shown] = Metric(float(value), float(error) if isinstance(error, int | float) else None)
    samples = found.get("n-samples", {}).get(name, {}).get("effective", 0)
    shots = found.get("n-shot", {}).get(name)
    protocol = f"lm-evaluation-harness {version('lm_eval')}, task version {found['versions'].get(name)}, {shots}-shot"
    return TaskResult(metrics, int(samples), "examples", truncated, protocol)
