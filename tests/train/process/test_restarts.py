"""Runs that torchrun starts again after a fault, with one launcher or several, and go on by themselves."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.train.launchers import (
    Launcher,
    exit_record,
    finish,
    free_port,
    start,
    wait_for_step,
    workers,
)
from tests.train.runs import TINY, Corpus, curve, read_lines, run, words

STEPS = 40
SETTINGS: dict[str, Any] = {**TINY, "train_iters": STEPS, "eval_interval": 1000,
                            "distributed_timeout_minutes": 0.5}


def settings_in(corpus: Corpus, folder: Path, **settings: Any) -> dict[str, Any]:
    checkpoints = str(folder / "checkpoints")
    return {**SETTINGS, **corpus.settings, "save": checkpoints, "load": checkpoints,
            "metrics_file": str(folder / "metrics.jsonl"), "save_interval": 4, **settings}


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return curve(run(tmp_path_factory.mktemp("truth"), {**SETTINGS, **corpus.settings}).lines)


def launch(where: Sequence[str], settings: dict[str, Any], log: Path) -> Launcher:
    """A launcher that restarts its processes up to three times."""
    return start([sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3", *where,
                  "-m", "megatron_ltd.pretrain_gpt", *words(settings)], log)


def assert_complete(folder: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """The run has come to its end with one curve, which is that of the uninterrupted run."""
    assert exit_record(folder / "checkpoints") == {"code": 0, "step": STEPS, "reason": "complete"}
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in uninterrupted]
    for line, wanted in zip(lines, uninterrupted, strict=True):
        if "lm_loss" in line:
            assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], rel=1e-5, abs=0.0), wanted["step"]


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_launchers_go_on_together_after_a_process_of_one_is_killed(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]], rendezvous: str,
) -> None:
    endpoint = f"localhost:{free_port()}"
    where = {"static": ["--master-addr", *endpoint.replace(":", " --master-port ").split()],
             "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]}[rendezvous]
    settings = settings_in(corpus, tmp_path)
    nodes = [launch(["--nnodes", "2", "--node-rank", str(node), *where], settings, tmp_path / f"{node}.log")
             for node in (0, 1)]
    wait_for_step(tmp_path / "metrics.jsonl", 6, nodes[0])
    os.kill(workers(nodes[1])[0], signal.SIGKILL)
    codes = [finish(node) for node in nodes]
    said = [(tmp_path / f"{node}.log").read_text() for node in (0, 1)]
    assert codes == [0, 0], "\n".join(said)
    assert sum(text.count("loaded ") for text in said) == 1
    assert_complete(tmp_path, uninterrupted)


def test_a_node_joins_whose_launcher_has_counted_fewer_restarts(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    where = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}",
             "--rdzv-conf", "last_call_timeout=5"]
    settings = settings_in(corpus, tmp_path)
    first = launch(where, settings, tmp_path / "first.log")
    wait_for_step(tmp_path / "metrics.jsonl", 6, first)
    os.kill(workers(first)[0], signal.SIGKILL)
    second = launch(where, settings, tmp_path / "second.log")
    codes = [finish(first), finish(second)]
    said = (tmp_path / "first.log").read_text() + (tmp_path / "second.log").read_text()
    assert codes == [0, 0], said
    assert "dp 1" in said and "dp 2" in said
    assert_complete(tmp_path, uninterrupted)


def test_planned_stops_are_continued_to_the_end(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]],
) -> None:
    settings = settings_in(corpus, tmp_path, exit_interval=STEPS // 2, save_interval=None)
    launcher = launch(["--standalone", "--nproc-per-node", "2"], settings, tmp_path / "log")
    assert finish(launcher) == 0, (tmp_path / "log").read_text()
    assert_complete(tmp_path, uninterrupted)


def test_a_run_goes_on_soon_after_one_process_has_hung(
    corpus: Corpus, tmp_path: Path, uninterrupted: list[dict[str, Any]],
) -> None:
    settings = settings_in(corpus, tmp_path, distributed_timeout_minutes=0.1)
    launcher = launch(["--standalone", "--nproc-per-node", "2"], settings, tmp_path / "log")
    wait_for_step(tmp_path / "metrics.jsonl", 6, launcher)
    os.kill(workers(launcher)[1], signal.SIGSTOP)
    code, said = finish(launcher), (tmp_path / "log").read_text()
    assert code == 0 and "rank 0: stopped, since another process failed or did not answer in time" in said, said
    assert "via Signals.SIGTERM, forcefully exiting" not in said, "torchrun had to wait until its own patience was over"
    assert_complete(tmp_path, uninterrupted)
