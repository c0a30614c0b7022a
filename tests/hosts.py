"""Several hosts on one machine: network namespaces whose cables a test can cut, slow down and make lose packets.

A host is a network namespace with a host name and a hosts file of its own. Its only interface is a TUN device, and a
thread of this process carries the packets between the devices. So a cut cable is silent (no packet, no reset), and
delay and loss need no `tc netem`, which many kernels lack. Files are shared, as on a cluster.

    with network(3) as hosts:
        process = hosts[0].start(["bash", "examples/pretrain_gpt.sh", ...], log, {"NNODES": "2:3"})
        hosts[1].cable.cut = True
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.train.launchers import environment

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
_NETNS = Path("/run/netns")
_HOSTS_FILES = Path("/etc/netns")
_NET = "10.77.0"
_NODE_NAME = "node"
_PACKET_BYTES = 65536


@dataclass
class Cable:
    """Between a host and the others.

    Args:
        delay_seconds: of each packet, on each of the two cables that it passes.
        loss: fraction of packets that it loses.
    """

    device: int
    cut: bool = False
    delay_seconds: float = 0.0
    loss: float = 0.0

    def loses(self, dice: random.Random) -> bool:
        return self.cut or (self.loss > 0 and dice.random() < self.loss)


@dataclass
class Host:
    """One host of a network."""

    number: int
    namespace: str
    cable: Cable
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{_NODE_NAME}{self.number}"

    @property
    def address(self) -> str:
        return f"{_NET}.{self.number + 1}"

    def start(self, command: Sequence[str], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on this host; the process is that of `ip netns exec`, which becomes the command's."""
        named = f'hostname {self.name} && exec "$@"'
        with log.open("wb") as stream:
            self.started.append(subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, "sh", *command],
                cwd=log.parent, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                env={**environment(), **variables}))
        return self.started[-1]

    def set_names(self, names: dict[str, str]) -> None:
        """Write the hosts file of this host's processes: address of each name."""
        folder = _HOSTS_FILES / self.namespace
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once

    def lose_power(self) -> None:
        """End all processes of this host at once; the others receive nothing, not even a reset."""
        self.cable.cut = True
        self.kill()

    def kill(self) -> None:
        while pids := subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True,
                                     check=True).stdout.split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        for process in self.started:
            process.wait()

    def enter(self) -> None:
        """Move this thread, and those that it starts from now on, to the host's network."""
        with (_NETNS / self.namespace).open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")


def why_not() -> str:
    """Why this machine allows no such network; empty if it does."""
    if os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        return "needs root, the command ip, and /dev/net/tun"
    name = f"try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        tried = subprocess.run(["ip", "netns", "exec", name, "unshare", "--uts", "true"], capture_output=True,
                               text=True, check=False)
        _ip("netns", "del", name)
    return "" if tried.returncode == 0 else f"network namespaces are not allowed: {tried.stderr.strip()}"


@contextmanager
def network(size: int) -> Iterator[list[Host]]:
    """So many hosts, all of whose processes end with the network."""
    hosts: list[Host] = []
    stopped = threading.Event()
    try:
        for number in range(size):
            hosts.append(_host(number))
        for host in hosts:
            host.set_names({"localhost": "127.0.0.1", **{other.name: other.address for other in hosts}})
        carrier = threading.Thread(target=_carry, args=(hosts, stopped), daemon=True)
        carrier.start()
        yield hosts
        stopped.set()
        carrier.join()
    finally:
        stopped.set()
        for host in hosts:
            host.kill()
            _ip("netns", "del", host.namespace)
            os.close(host.cable.device)
            shutil.rmtree(_HOSTS_FILES / host.namespace, ignore_errors=True)


def _host(number: int) -> Host:
    """A namespace with a device `eth0`, which is made here, where its other end stays, and moved there."""
    namespace = f"host-{os.getpid()}-{number}"
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"t{os.getpid()}-{number}"
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    host = Host(number, namespace, Cable(device))
    _ip("netns", "add", namespace)
    _ip("link", "set", name, "netns", namespace, "name", "eth0")
    _ip("-n", namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
    for interface in ("lo", "eth0"):
        _ip("-n", namespace, "link", "set", interface, "up")
    return host


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _carry(hosts: list[Host], stopped: threading.Event) -> None:
    """Carry packets from host to host, each when its delay is over and in order."""
    dice = random.Random(1)
    by_device = {host.cable.device: host for host in hosts}
    by_address = {socket.inet_aton(host.address): host for host in hosts}
    under_way: list[tuple[float, int, bytes, Cable]] = []
    sent = 0
    while not stopped.is_set():
        until_next = under_way[0][0] - time.monotonic() if under_way else 0.1
        ready, _, _ = select.select(list(by_device), [], [], min(0.1, max(0.0, until_next)))
        for device in ready:
            packet = os.read(device, _PACKET_BYTES)
            target = by_address.get(packet[16:20])  # of IPv4; there is no other traffic that matters
            cables = [by_device[device].cable, target.cable] if target is not None and packet[0] >> 4 == 4 else []
            if cables and not any(cable.loses(dice) for cable in cables):
                due = time.monotonic() + sum(cable.delay_seconds for cable in cables)
                sent += 1
                heapq.heappush(under_way, (due, sent, packet, cables[-1]))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, packet, cable = heapq.heappop(under_way)
            if not cable.cut:
                os.write(cable.device, packet)
