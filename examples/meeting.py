"""Where the launchers of an elastic run meet: at the first host of a list that is alive.

torch's rendezvous lives in one launcher and dies with it. The others then meet at another host of the list. A host that
comes back joins the others where they are, so every launcher looks for them before it becomes the host itself.
"""

import errno
import socket
import time
from dataclasses import dataclass

from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console

TURN_SECONDS = 3.0
"""Each host of the list waits so long for those before it to become the meeting place."""
PROBE_SECONDS = 1.0
TELL_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """A host and port to meet at."""

    host: str
    port: int

    @classmethod
    def read(cls, text: str, port: int) -> "Place":
        """From HOST or HOST:PORT.

        Args:
            port: used if none is given.

        Raises:
            ConfigError: it is neither.
        """
        host, colon, number = text.strip().rpartition(":")
        if not colon:
            host, number = number, str(port)
        if not host or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 65535:
            raise ConfigError(f"RDZV_HOSTS: {text.strip() or 'an empty entry'} must be HOST or HOST:PORT, with a port "
                              "from 1 to 65535")
        return cls(host, int(number))

    def answers(self) -> bool:
        """Whether a launcher hosts the meeting here."""
        try:
            socket.create_connection((self.host, self.port), PROBE_SECONDS).close()
        except OSError:
            return False
        return True

    def is_here(self) -> bool:
        """Whether this is an address of this machine."""
        try:
            found = socket.getaddrinfo(self.host, 0, type=socket.SOCK_STREAM)
        except OSError:
            return False
        return any(_is_own(family, address) for family, _, _, _, address in found)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _is_own(family: int, address: tuple[object, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return True


def meet(places: tuple[Place, ...]) -> tuple[Place, bool]:
    """The place to meet at, and whether this launcher is its host. Waits until there is one."""
    turn = next((number for number, place in enumerate(places) if place.is_here()), None)
    started = told = time.monotonic()
    while True:
        for place in places:
            if place.answers():
                return place, False
        now = time.monotonic()
        if turn is not None and now - started >= turn * TURN_SECONDS:
            return places[turn], True
        if now - told >= TELL_SECONDS:
            Console().line(f"no answer yet from {', '.join(map(str, places))}; trying again")
            told = now
        time.sleep(0.2)
