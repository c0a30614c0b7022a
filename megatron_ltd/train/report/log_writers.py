"""Log outputs of a run: the console, the metrics file, TensorBoard, Weights & Biases."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_ltd.config.files import LoggingConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.train.process.environment import StatusServer
from megatron_ltd.train.report.metrics import (
    StepReport,
    held_out_fields,
    held_out_line,
    task_scores_fields,
    task_scores_line,
)
from megatron_ltd.train.report.short_line import ShortLog
from megatron_ltd.train.report.train_job import TrainJobStatus
from megatron_ltd.train.result import HeldOut
from megatron_ltd.train.task_scores import TaskScores


class Writer(Protocol):
    """An output besides the console."""

    def write(self, fields: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """Appends one JSON object per line, so that the file holds one curve.

    A resumed run drops the records after its checkpoint; a run that starts from scratch renames an existing file to the
    next free name.

    Args:
        resumed_step: the step of the checkpoint, or 0.
    """

    def __init__(self, path: Path, resumed_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resumed_step == 0:
            count = 1
            while (aside := path.with_name(f"{path.name}.{count}")).exists():
                count += 1
            path.rename(aside)
        elif path.exists():
            _keep_until(path, resumed_step)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the whole run

    def roll_back(self, step: int) -> None:
        """Drop the records after a step."""
        self._file.close()
        path = Path(self._file.name)
        _keep_until(path, step)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open for the whole run

    def write(self, fields: dict[str, Any]) -> None:
        self._file.write(json.dumps(fields) + "\n")

    def close(self) -> None:
        self._file.close()


def _keep_until(path: Path, step: int) -> None:
    """Rewrite a file without the records after a step."""
    lines = [line for line in path.read_text().splitlines() if _belongs(line, step)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines))
    temporary.replace(path)


def _belongs(line: str, resumed_step: int) -> bool:
    """Whether a line is complete and not later than the step from which the run resumes."""
    try:
        return bool(json.loads(line)["step"] <= resumed_step)
    except (ValueError, KeyError, TypeError):
        return False


_OF_A_SET = re.compile(r"validation-(.+?)_(loss|ppl|sentence_order_loss)")
"""Numbers of a validation set with a name, which Megatron-LM writes as `lm loss validation-NAME`."""


class _TensorBoard:
    """The same tags as Megatron-LM's."""

    _TAGS = {"lm_loss": "lm loss", "grad_norm": "grad-norm", "learning_rate": "learning-rate",
             "global_batch_size": "batch-size", "step_seconds": "iteration-time", "tflops_per_device": "throughput",
             "sentence_order_loss": "sop loss", "validation_loss": "lm loss validation",
             "validation_ppl": "lm loss validation ppl", "validation_sentence_order_loss": "sop loss validation",
             "test_loss": "lm loss test", "test_ppl": "lm loss test ppl", "test_sentence_order_loss": "sop loss test",
             "loss_scale": "loss-scale"}

    def __init__(self, folder: str, settings: dict[str, Any], resumed_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"--tensorboard-dir = {folder} needs the tensorboard package: pip install "
                              "megatron_ltd[log]") from error
        self._writer = SummaryWriter(folder)
        rows = ["| section | setting | value |", "|---|---|---|"]
        rows += [f"| {section} | {name} | {value} |" for section, values in settings.items()
                 for name, value in values.items()]
        self._writer.add_text("settings", "\n".join(rows), resumed_step)

    def write(self, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(self._tag(name), value, fields["step"])

    def _tag(self, name: str) -> str:
        found = _OF_A_SET.fullmatch(name)
        if found is None:
            return self._TAGS.get(name, name)
        return self._TAGS[f"validation_{found[2]}"].replace("validation", f"validation-{found[1]}")

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, project: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"--wandb-project = {project} needs the wandb package: pip install "
                              "megatron_ltd[log]") from error
        self._error: type[Exception] = wandb.Error
        try:
            self._run = wandb.init(project=project, config=config)
        except wandb.Error as error:
            raise ConfigError(f"--wandb-project = {project}: Weights & Biases starts no run: {error} Log in with "
                              "`wandb login` or WANDB_API_KEY, set WANDB_MODE=offline, or leave it out") from error

    def write(self, fields: dict[str, Any]) -> None:
        try:
            self._run.log(fields, step=fields["step"])
        except self._error as error:
            raise OSError(str(error)) from error  # as of a file that cannot be written

    def close(self) -> None:
        try:
            self._run.finish()
        except self._error as error:
            raise OSError(str(error)) from error


class Metrics:
    """The log of one run; on all but one process it does nothing.

    A log that cannot be written does not end a run: it is closed with one warning.
    """

    def __init__(self, config: LoggingConfig, run_settings: dict[str, Any], console: Console, resumed_step: int):
        self.console = console
        short = config.log_format == "short" or (config.log_format == "auto" and console.on_terminal)
        self._short = ShortLog(console) if short else None
        self._writers: list[Writer] = []
        self._train_job: TrainJobStatus | None = None
        if not console.speaks:
            return
        server = StatusServer.from_environment()
        if server is not None:
            self._train_job = TrainJobStatus(server, console)
        if config.metrics_file is not None:
            try:
                self._writers.append(MetricsFile(Path(config.metrics_file), resumed_step))
            except OSError as error:
                raise ConfigError(f"--metrics-file = {config.metrics_file}: it cannot be written ({error.strerror}); "
                                  "choose a file in a folder that can be written") from error
        if config.tensorboard_dir is not None:
            try:
                self._writers.append(_TensorBoard(config.tensorboard_dir, run_settings, resumed_step))
            except OSError as error:
                raise ConfigError(f"--tensorboard-dir = {config.tensorboard_dir}: it cannot be written "
                                  f"({error.strerror}); choose a folder that can be written") from error
        if config.wandb_project is not None:
            self._writers.append(_WeightsAndBiases(config.wandb_project, run_settings))

    def progress(self, step: int, total_steps: int, seconds: float) -> None:
        """Count a step, whether it is reported or not."""
        if self._short is not None:
            self._short.count(step, total_steps, seconds)

    def step(self, report: StepReport) -> None:
        self.console.line(report.line() if self._short is None else self._short.line(report))
        self._write(report.fields())
        if self._train_job is not None:
            self._train_job.tell(report.consumed.steps, report.total_steps, report.fields())

    def held_out(self, name: str, step: int, found: HeldOut) -> None:
        self.console.line(held_out_line(name, step, found))
        self._write(held_out_fields(name, step, found))

    def task_scores(self, step: int, found: TaskScores) -> None:
        self.console.line(task_scores_line(step, found))
        for task, reason in found.failed.items():
            self.console.warn(f"task {task} failed at iteration {step}, and the run goes on: {reason}")
        self._write(task_scores_fields(step, found))

    def roll_back(self, step: int) -> None:
        """Drop from the metrics file what comes after a step; the other logs show both attempts."""
        self._on_each(lambda writer: writer.roll_back(step) if isinstance(writer, MetricsFile) else None)

    def close(self) -> None:
        for log in [*self._writers, self._train_job]:
            if log is not None:
                log.close()

    def _write(self, fields: dict[str, Any]) -> None:
        self._on_each(lambda writer: writer.write(fields))

    def _on_each(self, action: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                action(writer)
            except OSError as error:
                self._writers.remove(writer)
                self.console.warn(f"{type(writer).__name__} is given up for this run: {error}")
