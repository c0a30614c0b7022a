"""The tasks by name: a task is a file with `FILES` and `evaluate`, or a question of `choices.py`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.eval.requests import TokenScorer
from megatron_ltd.eval.results import EvalOptions, TaskResult
from megatron_ltd.eval.tasks import (
    commonsense,
    comprehension,
    lambada,
    minimal_pairs,
    open_questions,
    perplexity,
    science,
    wikitext,
)
from megatron_ltd.eval.tasks.task_files import find_task_file, sha256_of


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        files: where its file lies under --task-data, unpacked names, the first that exists counts.
        evaluate: scores a file.
    """

    files: tuple[str, ...]
    evaluate: Callable[[Path, TokenScorer, Tokenizer, EvalOptions], TaskResult]


CHOICE_TASKS = {**commonsense.TASKS, **science.TASKS, **comprehension.TASKS, **minimal_pairs.TASKS,
                **open_questions.TASKS}

TASKS: dict[str, Task] = {
    "lambada": Task(lambada.FILES, lambada.evaluate),
    "wikitext": Task(wikitext.FILES, wikitext.evaluate),
    "perplexity": Task(perplexity.FILES, perplexity.evaluate),
    **{name: Task(task.files, task.evaluate) for name, task in CHOICE_TASKS.items()},
}


@dataclass(frozen=True)
class TaskRun:
    """A task with its file and that file's SHA-256, under the name its result will have."""

    name: str
    task: Task
    path: Path
    sha256: str


def plan_tasks(listed: str, folder: Path | None) -> list[TaskRun]:
    """The runs asked for by `lambada,wikitext,perplexity=FILE`; all files are there before a model is loaded.

    A task's result has its name; a task listed with several files has one result `name:file` for each.

    Raises:
        ConfigError: an unknown task, a task listed twice, or no place to look for its file.
        DataError: its file is not there.
    """
    items = [item.strip() for item in listed.split(",") if item.strip()]
    if not items:
        raise ConfigError(f"--tasks = {listed!r} names no task. Choose from {', '.join(TASKS)}.")
    times = Counter(item.partition("=")[0] for item in items)
    runs: list[TaskRun] = []
    for item in items:
        name = item.partition("=")[0]
        if name not in TASKS:
            raise ConfigError(f"--tasks: there is no task {name!r}. Choose from {', '.join(TASKS)}.")
        path = _path_of(item, folder)
        runs.append(TaskRun(name if times[name] == 1 else f"{name}:{path.name}", TASKS[name], path, sha256_of(path)))
    repeated = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if repeated:
        raise ConfigError(f"--tasks lists {', '.join(repeated)} more than once. Keep one, or rename one of the files.")
    return runs


def _path_of(item: str, folder: Path | None) -> Path:
    name, named, given = item.partition("=")
    if named:
        if not Path(given).is_file():
            raise DataError(f"--tasks {item}: there is no file {given!r}. Check the path.")
        return Path(given)
    if not TASKS[name].files:
        raise ConfigError(f"--tasks {name} has no file of its own. Name one: --tasks {name}=PATH.")
    if folder is None:
        raise ConfigError(f"--tasks {name} needs --task-data, the folder of its file, or a file: {name}=PATH.")
    return find_task_file(name, folder, TASKS[name].files)
