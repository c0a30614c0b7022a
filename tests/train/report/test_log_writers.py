"""Where the numbers of a run go: one curve in the metrics file whatever happened before, and events elsewhere."""

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ltd.config.files import LoggingConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.train.report.log_writers import Metrics, MetricsFile
from megatron_ltd.train.result import HeldOut
from megatron_ltd.train.task_scores import TaskScores
from tests.train.report.test_metrics import REPORT


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, resumed_step: int, steps: range) -> None:
    log = MetricsFile(path, resumed_step)
    for step in steps:
        log.write({"step": step, "run": resumed_step})
    log.close()


def test_every_line_is_one_object(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "that is new" / "metrics.jsonl"
    write(path, 0, range(1, 4))
    assert lines(path) == [{"step": step, "run": 0} for step in (1, 2, 3)]
    assert path.read_text().endswith("}\n")


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    """A run that is killed loses no line."""
    log = MetricsFile(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    log.close()


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 8))
    write(path, 5, range(6, 9))
    assert [(line["step"], line["run"]) for line in lines(path)] == [
        (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 5), (7, 5), (8, 5)]
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_keeps_validations_and_drops_a_line_cut_in_half(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    found = ['{"step": 1, "lm_loss": NaN}', '{"step": 2, "validation_loss": 1.5}', "[3]", '{"lm_loss": 1}',
             '{"step": 2, "l']
    path.write_text("\n".join(found))
    write(path, 2, range(3, 4))
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert lines(path)[1] == {"step": 2, "validation_loss": 1.5}


def test_a_fresh_run_sets_an_older_curve_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for run in range(3):
        log = MetricsFile(path, 0)
        log.write({"step": 1, "number": run})
        log.close()
    curves = {found.name: lines(found)[0]["number"] for found in tmp_path.iterdir()}
    assert curves == {"metrics.jsonl": 2, "metrics.jsonl.1": 0, "metrics.jsonl.2": 1}


def test_a_resumed_run_without_an_older_file_starts_one(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 5, range(6, 8))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [6, 7]


def test_steps_and_validations_go_to_the_console_and_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(LoggingConfig(metrics_file=str(path)), {}, Console(), 0)
    metrics.step(REPORT)
    metrics.held_out("validation", 100, HeldOut(2.0))
    metrics.close()
    step, validation = lines(path)
    assert step == REPORT.fields() and validation["validation_loss"] == 2.0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "lm loss: 6.123457E+00" in printed[0] and "lm loss value: 2.0" in printed[1]


def test_processes_that_do_not_speak_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LoggingConfig(metrics_file=str(tmp_path / "a.jsonl"), tensorboard_dir=str(tmp_path / "b"))
    metrics = Metrics(config, {}, Console(speaks=False), 0)
    metrics.step(REPORT)
    metrics.held_out("validation", 100, HeldOut(2.0))
    metrics.task_scores(100, TaskScores({"copa": {"acc": (0.5, 0.1)}}, {"rte": "no"}))
    metrics.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


class FullDisk:
    """A file on a disk without space."""

    def write(self, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_is_given_up_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = Metrics(LoggingConfig(metrics_file=str(tmp_path / "metrics.jsonl")), {}, Console(), 0)
    (writer,) = metrics._writers
    monkeypatch.setattr(writer, "_file", FullDisk())
    for _ in range(3):
        metrics.step(REPORT)
    metrics.close()
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err.count("WARNING") == 1 and "No space left" in captured.err and "MetricsFile" in captured.err


@pytest.mark.parametrize("setting", ["metrics_file", "tensorboard_dir"])
@pytest.mark.parametrize("resumed_step", [0, 3])
def test_a_log_that_cannot_be_opened_is_the_users_to_repair(tmp_path: Path, setting: str, resumed_step: int) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    settings: dict[str, Any] = {setting: str(blocked / "log")}
    config = LoggingConfig(**settings)
    flag = "--" + setting.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag} = .*a file/log"):
        Metrics(config, {}, Console(), resumed_step)


def test_tensorboard_gets_megatrons_tags(tmp_path: Path) -> None:
    metrics = Metrics(LoggingConfig(tensorboard_dir=str(tmp_path)), {"model": {"num_layers": 2}}, Console(), 0)
    metrics.step(REPORT)
    metrics.held_out("validation", 100, HeldOut(2.0))
    metrics.held_out("validation-wiki", 100, HeldOut(3.0))
    metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {"lm loss": 6.1234567, "grad-norm": 1.23456, "learning-rate": 1.5e-4, "batch-size": 8.0,
                "iteration-time": 0.5, "throughput": 0.3, "loss-scale": 1.0, "lm loss validation": 2.0,
                "lm loss validation ppl": 7.3890561, "lm loss validation-wiki": 3.0,
                "lm loss validation-wiki ppl": 20.085537, "kept_length": 256.0, "consumed_layer_tokens": 307_200.0}
    for tag, value in expected.items():
        assert found[tag] == [(100, pytest.approx(value, rel=1e-6))]
    assert "step" not in found
    (settings,) = events.Tensors("settings/text_summary")
    assert settings.step == 0 and b"| model | num_layers | 2 |" in settings.tensor_proto.string_val[0]


class WandbError(Exception):
    """Stands for `wandb.Error`, of which all errors of that package are."""


def test_weights_and_biases_gets_the_settings_and_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    run = SimpleNamespace(log=lambda fields, step: seen.append((step, fields)), finish=lambda: seen.append("finished"))

    def init(project: str, config: dict[str, Any]) -> SimpleNamespace:
        seen.append((project, config))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=WandbError))
    metrics = Metrics(LoggingConfig(wandb_project="p"), {"model": {"num_layers": 2}}, Console(), 0)
    metrics.step(REPORT)
    metrics.close()
    assert seen == [("p", {"model": {"num_layers": 2}}), (100, REPORT.fields()), "finished"]


def test_without_a_login_to_weights_and_biases_a_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    init = mock.Mock(side_effect=WandbError("No API key configured."))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=WandbError))
    with pytest.raises(ConfigError, match="--wandb-project = p: .*No API key configured. Log in with `wandb login`"):
        Metrics(LoggingConfig(wandb_project="p"), {}, Console(), 0)


def test_weights_and_biases_that_fails_is_given_up_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    run = mock.Mock(log=mock.Mock(side_effect=WandbError("the service is gone")))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run, Error=WandbError))
    metrics = Metrics(LoggingConfig(wandb_project="p"), {}, Console(), 0)
    metrics.step(REPORT)
    metrics.step(REPORT)
    metrics.close()
    assert run.log.call_count == 1 and "given up for this run: the service is gone" in "".join(capsys.readouterr())


@pytest.mark.parametrize(("config", "module", "message"), [
    (LoggingConfig(wandb_project="mine"), "wandb", "--wandb-project = mine needs the wandb package: pip install"),
    (LoggingConfig(tensorboard_dir="/tmp/x"), "torch.utils.tensorboard", "--tensorboard-dir = /tmp/x needs"),
])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, config: LoggingConfig, module: str,
                                                    message: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=message):
        Metrics(config, {}, Console(), 0)
