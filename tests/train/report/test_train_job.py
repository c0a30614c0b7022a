"""What a TrainJob's status server is sent, and that nothing depends on it."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_ltd.config.files import LoggingConfig
from megatron_ltd.log import Console
from megatron_ltd.train.process.environment import StatusServer
from megatron_ltd.train.report.log_writers import Metrics
from megatron_ltd.train.report.train_job import TrainJobStatus
from tests.train.report.test_metrics import REPORT

Received = list[tuple[str | None, dict[str, Any]]]


@pytest.fixture
def server() -> Iterator[tuple[str, Received]]:
    """Its address, and the tokens and bodies that it has received."""
    received: Received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.headers["Authorization"], json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening, mock.patch.dict(os.environ, no_proxy="127.0.0.1"):
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/status", received
        listening.shutdown()


def test_a_run_tells_its_progress_with_the_token_of_the_moment(
    server: tuple[str, Received], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, received = server
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", address)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    metrics = Metrics(LoggingConfig(), {}, Console(), 0)
    metrics.step(REPORT)
    metrics.close()
    [(token, body)] = received
    assert token == "Bearer secret" and body.keys() == {"trainerStatus"}
    status, step = body["trainerStatus"], REPORT.consumed.steps
    assert status["progressPercentage"] == 100 * step // REPORT.total_steps and "T" in status["lastUpdatedTime"]
    values = {metric["name"]: metric["value"] for metric in status["metrics"]}
    assert values["step"] == str(step) and float(values["loss"]) == REPORT.loss


def test_the_time_left_follows_from_the_steps_since_the_start(
    server: tuple[str, Received], monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, received = server
    status, seconds = TrainJobStatus(StatusServer(address), Console()), iter([5.0, 25.0])
    monkeypatch.setattr("megatron_ltd.train.report.train_job.time.monotonic", lambda: next(seconds))
    status.tell(100, 200, {})
    status.tell(110, 200, {})
    monkeypatch.undo()
    status.close()
    assert received[-1][0] is None and received[-1][1]["trainerStatus"]["estimatedRemainingSeconds"] == 180


def test_a_server_that_is_away_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_ltd.log._said", set())
    status = TrainJobStatus(StatusServer("http://127.0.0.1:9/nobody"), Console(), 0.01)
    for step in range(1, 30):
        status.tell(step, 30, {})
    status.close()
    assert capsys.readouterr().err.count("the TrainJob's status server does not take the progress") == 1
