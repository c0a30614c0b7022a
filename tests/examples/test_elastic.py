"""Runs whose nodes come and go: launchers on one machine, one of them killed with its processes."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed import TCPStore

from examples import meeting
from examples.meeting import Place, meet
from megatron_ltd.errors import EXIT_ON_SIGNAL, ConfigError
from megatron_ltd.train.process.attempt import attempt_store
from megatron_ltd.train.process.elastic import placed, tell_spares, wait_as_spare
from megatron_ltd.train.process.environment import Launch
from tests.gloo import launch_ranks
from tests.train.launchers import environment, exit_record, free_port, wait_for_step, wait_until
from tests.train.runs import TINY, Corpus, read_lines, run, words, write_corpus

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
SETTINGS: dict[str, Any] = {**TINY, "train_iters": STEPS, "eval_interval": 1000, "distributed_timeout_minutes": 0.5}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@dataclass
class Nodes:
    """The launchers of a run, each with a process group of its own."""

    folder: Path
    command: list[str]
    variables: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> int:
        log = self.folder / f"node-{len(self.started)}.log"
        with log.open("wb") as stream:
            self.started.append(subprocess.Popen(
                ["bash", str(ROOT / "examples" / "pretrain_gpt.sh"), *self.command], cwd=self.folder, stdout=stream,
                stderr=subprocess.STDOUT, env={**environment(), **self.variables}, start_new_session=True))
        return len(self.started) - 1

    def lose(self, node: int) -> None:
        os.killpg(self.started[node].pid, signal.SIGKILL)
        for process in _session(self.started[node].pid):
            os.kill(process, signal.SIGKILL)

    def said(self, node: int) -> str:
        return (self.folder / f"node-{node}.log").read_text(errors="replace")

    def wait_for(self, node: int, words: str) -> None:
        deadline = time.monotonic() + 300
        while words not in self.said(node):
            assert self.started[node].poll() is None and time.monotonic() < deadline, self.said(node)
            time.sleep(0.05)


def _session(leader: int) -> Iterator[int]:
    """The processes that were started under one; torchrun puts its own into sessions of their own."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == leader:
            yield int(status.parent.name)


@pytest.fixture
def nodes(corpus: Corpus, tmp_path: Path) -> Iterator[Nodes]:
    checkpoints = str(tmp_path / "checkpoints")
    settings = {**SETTINGS, **corpus.settings, "save": checkpoints, "load": checkpoints, "save_interval": 4,
                "metrics_file": str(tmp_path / "metrics.jsonl")}
    places = ",".join(f"localhost:{free_port()}" for _ in range(2))
    found = Nodes(tmp_path, words(settings), {"GPUS_PER_NODE": "1", "NNODES": "1:2", "RDZV_HOSTS": places})
    yield found
    for node, process in enumerate(found.started):
        if process.poll() is None:
            found.lose(node)
        process.wait()


def test_a_run_survives_the_loss_of_the_node_at_which_all_met_takes_it_back_and_lets_another_leave_in_order(
    corpus: Corpus, tmp_path: Path, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory,
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    host = nodes.start()
    nodes.wait_for(host, "hosting the meeting")
    other = nodes.start()
    nodes.wait_for(host, "dp 2")
    wait_for_step(metrics, 6, nodes.started[other])
    nodes.lose(host)
    again = nodes.start()
    wait_until(lambda: "dp 2," in nodes.said(again) + nodes.said(other), nodes.started[again])
    shared = checkpointed(tmp_path) + 4
    wait_until(lambda: checkpointed(tmp_path) >= shared, nodes.started[again])
    nodes.started[other].send_signal(signal.SIGTERM)
    codes = [nodes.started[node].wait(240) for node in (other, again)]
    assert codes == [EXIT_ON_SIGNAL, 0], nodes.said(other) + nodes.said(again)
    assert "dp 2," in nodes.said(other) + nodes.said(again)
    assert "dp 1," in nodes.said(again)  # went on without it
    assert exit_record(tmp_path / "checkpoints") == {"code": 0, "step": STEPS, "reason": "complete"}
    truth = run(tmp_path_factory.mktemp("truth"), {**SETTINGS, **corpus.settings}).lines
    found = read_lines(metrics)
    assert [line["step"] for line in found] == [line["step"] for line in truth]
    for line, wanted in zip(found, truth, strict=True):
        if "lm_loss" in wanted:
            assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], rel=1e-5, abs=0.0), wanted["step"]


def checkpointed(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return int((folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


def test_a_place_that_answers_comes_before_one_s_own() -> None:
    own, others = Place("localhost", free_port()), Place("localhost", free_port())
    assert meet((own, others)) == (own, True)
    store = TCPStore("localhost", others.port, None, True, wait_for_workers=False)
    assert meet((own, others)) == (others, False)
    del store
    assert meet((own, others)) == (own, True)


def test_a_place_at_which_another_program_listens_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    taken, free = Place("localhost", free_port()), Place("localhost", free_port())
    with socket.create_server(("localhost", taken.port)), mock.patch.object(meeting, "GREET_SECONDS", 0.2):
        assert not taken.is_free() and free.is_free()
        assert meet((taken, free)) == (free, True)
    assert f"{taken}: another program listens there" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "host:", ":29500", "host:0", "host:65536", "host:port"])
def test_a_place_is_a_host_and_perhaps_a_port(text: str) -> None:
    assert Place.read("node0", 29500) == Place("node0", 29500) and Place.read(" node0:1 ", 2) == Place("node0", 1)
    with pytest.raises(ConfigError, match="must be HOST or HOST:PORT"):
        Place.read(text, 29500)


def test_processes_that_do_not_fit_are_spares(capsys: pytest.CaptureFixture[str]) -> None:
    place = placed(Launch(rank=0, world_size=7, most=8), lambda processes: processes in (2, 4, 8))
    assert (place.world_size, place.spares) == (4, 3)
    assert "7 processes, of which 4 train" in capsys.readouterr().out


def spare_or_not(rank: int, world_size: int, init_method: str) -> int:
    """Two processes train, and the third learns how they ended."""
    here = Launch(rank, rank, 2, init_method, spares=1)
    if rank == 2:
        return wait_as_spare(here, timedelta(seconds=60))
    store = attempt_store(init_method, rank, 3, timedelta(seconds=60))
    tell_spares(here, store, 11)
    return 11


def test_spares_learn_how_the_run_ended() -> None:
    assert launch_ranks(spare_or_not, 3) == [11, 11, 11]
