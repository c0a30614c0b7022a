"""Runs tasks of lm-evaluation-harness, on local files in place of downloads where there are any."""

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, DataError, UserError
from megatron_ltd.lm_eval.harness.answers import check_answers, first_unreadable
from megatron_ltd.lm_eval.harness.local import SUFFIXES, LocalSplits, needed_splits
from megatron_ltd.lm_eval.harness.metrics import metrics_of, samples_of
from megatron_ltd.lm_eval.requests import TokenScorer
from megatron_ltd.lm_eval.results import EvalOptions, TaskResult
from megatron_ltd.lm_eval.rows import notes_on_examples
from megatron_ltd.lm_eval.tasks.names import TaskRun
from megatron_ltd.parallel.agreement import gather_json


class Harness:
    """The harness with its index of tasks, of which those with local files read these, and our model as one of its
    models.

    Args:
        folder: has a folder of files for each task.
        files: of tasks, in place of their folders.
    """

    def __init__(self, folder: Path | None, num_fewshot: int | None, files: Mapping[str, Path] | None = None):
        self.folder, self.num_fewshot, self.files = folder, num_fewshot, files or {}
        self.local: dict[str, LocalSplits] = {}
        self.broken: dict[str, Exception] = {}
        self._model: Any = None

    @cached_property
    def manager(self) -> Any:
        """The index of the harness's tasks, which takes seconds to read."""
        manager = importlib.import_module("lm_eval.tasks").TaskManager()
        names = set(manager.all_subtasks)
        folders = () if self.folder is None or not self.folder.is_dir() else self.folder.iterdir()
        for name, path in ({path.name: path for path in folders if path.is_dir()} | dict(self.files)).items():
            splits = LocalSplits(path) if name in names else None
            if splits is not None and splits.files:
                entry = manager.task_index[name]
                try:
                    config = _config(entry)
                except Exception as error:  # a task may hold any code; told when it is asked for
                    self.broken[name] = error
                    continue
                self.local[name] = splits
                manager.task_index[name] = replace(entry, yaml_path=None, cfg=config | _reading(splits, config))
        return manager

    def leaves(self, name: str) -> list[str]:
        """The tasks of a group or tag, or the task itself."""
        entry = self.manager.task_index.get(name)
        if entry is None or name in self.manager.all_subtasks:
            return [name]
        members = entry.tags if name in self.manager.all_tags else _config(entry).get("task") or ()
        names = [one if isinstance(one, str) else one.get("task") or one.get("group") for one in members]
        return sorted({leaf for one in names if isinstance(one, str) for leaf in self.leaves(one)})

    def model(self, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> Any:
        if self._model is None:
            self._model = importlib.import_module("megatron_ltd.lm_eval.harness.model").HarnessModel(
                scorer, tokenizer, bos=options.bos, overlong=options.overlong, show_progress=options.show_progress)
        return self._model


def _config(entry: Any) -> dict[str, Any]:
    """What a task or group of the index is defined by."""
    if entry.yaml_path is None:
        return dict(entry.cfg or {})
    read = importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml
    return dict(read(entry.yaml_path, resolve_func=True))


def _reading(splits: LocalSplits, config: Mapping[str, Any]) -> dict[str, Any]:
    """What lets a task read these files: a setting, or a method where it is a class of its own."""
    if "class" not in config:
        return {"custom_dataset": lambda **settings: splits}
    kind = config["class"]
    return {"class": type(kind.__name__, (kind,), {"download": lambda self, *a, **k: setattr(self, "dataset", splits)})}


@dataclass(frozen=True)
class HarnessTask:
    """A task or group of the harness.

    Args:
        local: the files of its splits, by task, of those that have any.
    """

    name: str
    local: dict[str, LocalSplits]
    harness: Harness

    def evaluate(self, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> dict[str, TaskResult]:
        """The results of the task, or of a group and its parts.

        Raises:
            DataError: the harness cannot run it on these files.
        """
        loaded, notes = self._agreed(options)
        groups = loaded.get("groups", {})
        model = self.harness.model(scorer, tokenizer, options)
        model.forget()
        try:
            found = importlib.import_module("lm_eval.evaluator").simple_evaluate(
                model=model, tasks=[groups[self.name]] if groups else [*loaded["tasks"].values()],
                task_manager=self.harness.manager, num_fewshot=self.harness.num_fewshot,
                limit=options.limit, log_samples=options.log_samples)
        except UserError:
            raise
        except Exception as error:  # a task may hold any code
            if model.scoring:
                raise
            which = "".join(first_unreadable(task, options.limit, self.local.get(task.task_name))
                            for task in loaded["tasks"].values())
            raise DataError(f"{self.name}: lm-evaluation-harness cannot score it: {_said(error)}.{which} "
                            f"Check the examples in {self.place}.") from error
        # On all but the first process of a machine the harness returns nothing.
        leaves = {} if found is None else {name: [name] for name in found["configs"]} | {
            group: [task.task_name for task in part.get_all_tasks()] for group, part in groups.items()}
        return {} if found is None else {
            name: _result(name, numbers, found, model, leaves.get(name, []), notes)
            for name, numbers in found["results"].items()}

    def _agreed(self, options: EvalOptions) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The task as the harness loads it, on every process or on none, and what is to be told of it."""
        loaded: dict[str, Any] = {}
        problem = None
        notes: tuple[str, ...] = ()
        try:
            loaded, notes = self.loaded(options)
        except UserError as error:
            problem = str(error)
        problems = {found for found in gather_json(problem) if found is not None}
        if problems:
            raise DataError("\n".join(sorted(problems)))
        return loaded, notes

    def loaded(self, options: EvalOptions) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The tasks and groups as the harness loads them, and what is to be told of them.

        Raises:
            DataError: its examples are not there, or cannot be read.
        """
        notes: list[str] = []
        try:
            for leaf in self.harness.leaves(self.name):
                if leaf in self.harness.broken:
                    raise self.harness.broken[leaf]
            loaded = self.harness.manager.load([self.name])
            tasks = loaded["tasks"].values()
            for task in tasks:
                if task.task_name in self.local:
                    for split, purpose in needed_splits(task, self.harness.num_fewshot).items():
                        self.local[task.task_name].must_have(split, purpose)
                        notes += [f"{task.task_name}: {note}" for note in self.local[task.task_name].told(split)]
                notes += check_answers(task, options.limit, self.local.get(task.task_name))
            return loaded, tuple(notes)
        except UserError:
            raise
        except Exception as error:  # a task may hold any code, and a download fails in many ways
            absent = "".join(splits.absent() for splits in self.local.values())[:600]
            folder = self.place if self.is_one else self.place / "TASK"
            leaves = self.harness.leaves(self.name)
            without = [leaf for leaf in leaves if leaf not in self.local]
            if self.local and without:
                absent += f" {len(without)} of {len(leaves)} tasks have no files: {', '.join(without)}"[:300] + "."
            raise DataError(f"{self.name}: lm-evaluation-harness cannot load it: {_said(error)}. Looked for "
                            f"{LocalSplits(folder).looked_for()}; what is not there is downloaded.{absent}"
                            ) from error

    @property
    def is_one(self) -> bool:
        """Whether it is a single task."""
        return self.harness.leaves(self.name) == [self.name]

    @property
    def place(self) -> Path:
        """Where its files are, or where they were looked for."""
        folder = self.harness.folder or Path("hub")
        return self.harness.files.get(self.name, folder / self.name) if self.is_one else folder

    @property
    def sha256(self) -> str:
        """Of its files; of the digests of its tasks where it has several."""
        if self.is_one and self.local:
            return self.local[self.name].sha256
        digests = [f"{name} {splits.sha256}" for name, splits in sorted(self.local.items())]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else ""


def _said(error: BaseException) -> str:
    """An error and what it came from, in a line."""
    text = f"{type(error).__name__}: {error}".split("\n")[0][:300].rstrip(".")
    return text if error.__cause__ is None else f"{text}, from {_said(error.__cause__)}"


def plan_harness(items: Sequence[str], folder: Path | None, num_fewshot: int | None) -> list[TaskRun]:
    """The harness's tasks, groups and tags of these names, with the files `folder`/TASK/SPLIT.jsonl.

    Args:
        items: names, or NAME=FILE with the examples of a task.
        num_fewshot: None for each task's own.

    Raises:
        ConfigError: the harness is not installed, or there is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"task {', '.join(items)} needs lm-evaluation-harness: pip install 'megatron_ltd[eval]'.")
    given = {name: Path(file) for name, named, file in (item.partition("=") for item in items) if named}
    names = [item.partition("=")[0] for item in items]
    if len(set(names)) < len(names):
        raise ConfigError(f"tasks {', '.join(names)}: name every task of the harness once.")
    harness, runs = Harness(folder, num_fewshot, given), []
    unknown = [name for name in names if name not in harness.manager.all_tasks]
    if unknown:
        raise ConfigError(f"there is no task {', '.join(map(repr, unknown))} in lm-evaluation-harness "
                          f"{version('lm_eval')}; `lm-eval ls tasks` lists its tasks.")
    for name in names:
        local = {leaf: harness.local[leaf] for leaf in harness.leaves(name) if leaf in harness.local}
        task, sha256, problem = HarnessTask(name, local, harness), "", None
        try:
            if name in given and not local:
                raise DataError(f"task {name}={given[name]}: there is no such file, or it is none of "
                                f"{', '.join(SUFFIXES)}, or {name} is a group. Check the path.")
            sha256 = task.sha256
        except UserError as error:
            problem = error
        runs.append(TaskRun(name, task.place if local else Path("hub"), sha256, task.evaluate, problem, task.loaded))
    return runs


def _result(name: str, numbers: dict[str, Any], found: dict[str, Any], model: Any, leaves: list[str],
            notes: tuple[str, ...]) -> TaskResult:
    metrics = metrics_of(numbers)
    counted = found.get("n-samples", {})
    n = sum(int(counted.get(leaf, {}).get("effective", 0)) for leaf in leaves)
    shots, task_version = found.get("n-shot", {}).get(name), found["versions"].get(name)
    protocol = f"lm-evaluation-harness {version('lm_eval')}, task version {task_version}, {shots}-shot"
    samples = samples_of(found.get("samples", {}).get(name, ()), metrics)
    cut, apart = (sum(len(counts[leaf]) for leaf in leaves) for counts in (model.cut, model.apart))
    return TaskResult(metrics, n, "examples", cut, protocol, {},
                      tuple(note for note in notes if len(leaves) == 1 and note.startswith(f"{name}: "))
                      + notes_on_examples(0, apart), samples, shots,
                      None if task_version is None else str(task_version))
