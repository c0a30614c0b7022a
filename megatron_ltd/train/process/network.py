"""Which of this host's addresses lead to the others, and how a host that has vanished is noticed."""

import fcntl
import math
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

_SIOCGIFADDR = 0x8915
SILENT_SECONDS = 5
"""A host that has acknowledged nothing for so long counts as lost."""


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def addresses_of(host: str) -> list[str]:
    """The addresses of a host's name, IPv4 first; none if it is unknown."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(address[0]) for family, _, _, _, address in sorted(found, key=lambda entry: entry[0])]


def own_address(others: Iterable[str]) -> str | None:
    """The address of this host from which packets to the others leave; the only one it has, if none of them says.

    Args:
        others: names or addresses of hosts, this one perhaps among them.
    """
    for address in (address for host in others for address in addresses_of(host) if not is_loopback(address)):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))  # sends nothing
            except OSError:
                continue
            return str(probe.getsockname()[0])
    own = [address for address in _interfaces().values() if not is_loopback(address)]
    return own[0] if len(own) == 1 else None


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address."""
    return next((name for name, found in _interfaces().items() if found == address), None)


def _interfaces() -> dict[str, str]:
    """Interface -> its IPv4 address."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def notice_silence(port: int, answer_seconds: float | None = None) -> None:
    """Have the kernel end this process's connections to a port once the other end has been silent for `SILENT_SECONDS`.

    A host that loses its power or its network sends no reset. torch then waits in a read without a limit, until the
    kernel gives the connection up, which takes about 15 minutes. Only for connections whose other end always reads,
    such as those to a store: one that is merely slow to read is silent too.

    Args:
        answer_seconds: after which a read fails too. The host of a process that is stopped is not silent, and torch's
            client waits for that process without a limit once its own is over.
    """
    def watch(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1),
                              (socket.TCP_KEEPCNT, SILENT_SECONDS), (socket.TCP_USER_TIMEOUT, 1000 * SILENT_SECONDS)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        if answer_seconds is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                                  struct.pack("ll", math.ceil(answer_seconds), 0))

    _at_connections(port, watch)


@contextmanager
def connecting(port: int | None, seconds: float) -> Iterator[None]:
    """Meanwhile this process's connections to a port end once so much time has passed.

    torch's client greets the process that keeps a store, and waits for the answer without a limit: that process may be
    stopped while it starts.
    """
    over = threading.Event()

    def end_late_ones() -> None:
        wait = seconds
        while not over.wait(wait):
            _at_connections(port, lambda connection: connection.shutdown(socket.SHUT_RDWR))
            wait = 1.0  # the client tries again for a while

    watch = threading.Thread(target=end_late_ones, daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _at_connections(port: int | None, act: Callable[[socket.socket], None]) -> None:
    """Do something with each of this process's connections to a port."""
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with suppress(OSError):  # closed in the meantime, or not connected
            if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{entry}").st_mode):
                with socket.socket(fileno=os.dup(int(entry))) as connection:
                    internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if internet and connection.type == socket.SOCK_STREAM and connection.getpeername()[1] == port:
                        act(connection)
