"""Scores on tasks during a run, on the run's own processes and layout: `--eval-tasks`."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError, UserError
from megatron_ltd.lm_eval.bos import choose_bos
from megatron_ltd.lm_eval.listed import plan_listed
from megatron_ltd.lm_eval.results import EvalOptions, TaskResult
from megatron_ltd.lm_eval.scorer import ModelScorer
from megatron_ltd.lm_eval.tasks.names import TaskRun
from megatron_ltd.lm_eval.tasks.task_files import sha256_of
from megatron_ltd.log import Console
from megatron_ltd.parallel.agreement import gather_json
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.setup import Model
from megatron_ltd.train.task_scores import TaskScores


def plan_tasks(config: RunConfig) -> "RunTasks":
    """The tasks of --eval-tasks.

    Raises:
        ConfigError: an unknown task.
        DataError: the file of one is not there.
    """
    settings = config.logging
    folder = None if settings.task_data is None else Path(settings.task_data)
    plan = plan_listed(settings.eval_tasks or "", folder, None, flag="--eval-tasks")
    problems = [run.problem for run in plan if run.problem is not None]
    for run in plan:
        try:
            if run.load is not None:
                run.load(EvalOptions(limit=settings.eval_tasks_limit))
        except UserError as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(["--eval-tasks:", *map(str, problems)]))
    return RunTasks(plan)


@dataclass(frozen=True)
class RunTasks:
    """The tasks of a run."""

    plan: list[TaskRun]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(f"{run.name} {run.sha256}" for run in self.plan).encode()).hexdigest()

    def scores(self, model: Model, runtime: Runtime, config: RunConfig, tokenizer: Tokenizer,
               console: Console) -> Callable[[], TaskScores]:
        """What scores the model as it is when called."""
        bos, told = choose_bos(tokenizer, None, none_wanted=False, trained_here=True, recorded=config.data.bos_token)
        if told is not None:
            console.line(f"--eval-tasks: {told}")
        options = EvalOptions(limit=config.logging.eval_tasks_limit, bos=bos)
        scorer = ModelScorer(model, runtime, config)
        return _Scores(self.plan, scorer, tokenizer, options, config.training.compile)


@dataclass(frozen=True)
class _Scores:
    plan: list[TaskRun]
    scorer: ModelScorer
    tokenizer: Tokenizer
    options: EvalOptions
    compiled: bool

    def __call__(self) -> TaskScores:
        results: dict[str, TaskResult] = {}
        failed: dict[str, str] = {}
        # Rows have many lengths, each of which would be compiled.
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            for run in self.plan:
                try:
                    _check_unchanged(run)
                    results |= run.evaluate(self.scorer, self.tokenizer, self.options)
                except UserError as error:
                    failed[run.name] = f"{type(error).__name__}: {error}"
        metrics = {task: {name: (metric.value, metric.stderr) for name, metric in result.metrics.items()}
                   for task, result in results.items()}
        return TaskScores(metrics, failed)


def _check_unchanged(run: TaskRun) -> None:
    """Check, on every process or on none, that the task's file is the one that the run began with.

    Raises:
        DataError: it is not.
    """
    problem = None
    if run.path.is_file():
        try:
            problem = None if sha256_of(run.path) == run.sha256 else f"{run.path} has changed since the run began"
        except UserError as error:
            problem = str(error).rstrip(".")
    elif run.sha256 and not run.of_harness:
        problem = f"{run.path} was there when the run began, and is not there now"
    problems = {found for found in gather_json(problem) if found is not None}
    if problems:
        raise DataError("\n".join(sorted(problems)) + ". Restore it.")
