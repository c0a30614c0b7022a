"""Processes on hosts of their own, network namespaces whose cables are cut; longer trials are in
tests/extra/several_hosts.py."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ltd.errors import EXIT_PEER_LOST
from megatron_ltd.train.process.network import SILENT_SECONDS, addresses_of, interface_of, own_address
from tests.gloo import launch_ranks
from tests.hosts import Host, network, why_not
from tests.train.launchers import whole_lines
from tests.train.runs import TINY, Corpus, Settings, pretrain

PER_HOST = 1
WAITS_FOR_A_WORD = """
import socket, sys
from megatron_ltd.train.process.network import interface_of, notice_silence, own_address
address = own_address(["node0", "node1"])
print(address, interface_of(address), flush=True)
with socket.create_connection(("node1", 29500)) as connection:
    notice_silence(29500)
    print("connected", flush=True)
    connection.sendall(b"a word that waits for its answer")
    connection.recv(1)
"""
LISTENS = """
import socket, time
server = socket.create_server(("", 29500))
print("listens", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    if why_not():
        pytest.skip(why_not())
    with network(3) as found:
        yield found


def wait_for(log: Path, word: str) -> None:
    deadline = time.monotonic() + 60
    while word not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_a_host_that_vanishes_without_a_reset_is_noticed_by_those_that_wait_for_it(
    hosts: list[Host], tmp_path: Path,
) -> None:
    names = {"localhost": "127.0.0.1", "node0": "127.0.1.1", "node1": hosts[1].address}  # its own as Debian has it
    hosts[0].set_names(names)
    hosts[1].start([sys.executable, "-c", LISTENS], tmp_path / "listens", {})
    wait_for(tmp_path / "listens", "listens")
    waiting = hosts[0].start([sys.executable, "-c", WAITS_FOR_A_WORD], tmp_path / "waits", {})
    wait_for(tmp_path / "waits", "connected")
    assert (tmp_path / "waits").read_text().startswith(f"{hosts[0].address} eth0\n")
    hosts[1].cable.cut = True
    try:
        assert waiting.wait(60 + SILENT_SECONDS) == 1  # the kernel itself would take a quarter of an hour
        assert "TimeoutError" in (tmp_path / "waits").read_text()
    finally:
        hosts[1].cable.cut = False


def pretrain_on_a_host(rank: int, world_size: int, init_method: str, hosts: list[Host], settings: Settings) -> int:
    hosts[rank // PER_HOST].enter()
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    return pretrain(rank, world_size, init_method, settings).code


def test_a_link_that_goes_down_ends_the_run_on_all_hosts(hosts: list[Host], corpus: Corpus, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    settings = {**TINY, **corpus.settings, "global_batch_size": 12, "train_iters": 100_000, "eval_interval": 10 ** 6,
                "distributed_timeout_minutes": 0.1, "metrics_file": str(metrics)}
    places = [Host(host.number, host.namespace, host.cable) for host in hosts]  # without processes
    codes: list[int] = []
    run = threading.Thread(target=lambda: codes.extend(
        launch_ranks(pretrain_on_a_host, 3 * PER_HOST, places, settings, timeout=150)))
    run.start()
    while run.is_alive() and not (metrics.exists() and any(line["step"] >= 3 for line in whole_lines(metrics))):
        time.sleep(0.05)
    hosts[2].cable.cut = True
    try:
        run.join()
        assert codes == [EXIT_PEER_LOST] * 3 * PER_HOST
        assert max(line["step"] for line in whole_lines(metrics)) >= 3
    finally:
        hosts[2].cable.cut = False


def test_addresses_of_names() -> None:
    assert "127.0.0.1" in addresses_of("localhost") and addresses_of("no.such.name.invalid") == []
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None
    assert own_address(["localhost"]) != "127.0.0.1"
