"""Where the launchers of an elastic run meet: at the first host of a list that is alive.

torch's rendezvous lives in one launcher and dies with it. The others then meet at another host of the list. A host that
comes back joins the others where they are, so every launcher looks for them before it becomes the host itself.
"""

import contextlib
import errno
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console

TURN_SECONDS = 3.0
"""Each host of the list waits so long for those before it to become the meeting place."""
PROBE_SECONDS = 1.0
GREET_SECONDS = 5.0
"""So long may a launcher take to answer; another program never does."""
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
        """Whether something listens here, a launcher that hosts the meeting or another program."""
        try:
            socket.create_connection((self.host, self.port), PROBE_SECONDS).close()
        except OSError:
            return False
        return True

    def is_free(self) -> bool:
        """Whether this machine's port can be listened on."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", self.port))
                probe.listen()
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


class Greeting:
    """Whether a place that listens is a meeting: torch's store is greeted there, in a thread, since its client waits
    without a limit for another program's answer."""

    def __init__(self, place: Place):
        self.place, self.answered = place, False
        self.thread = threading.Thread(target=self._greet, daemon=True)
        self.thread.start()

    def _greet(self) -> None:
        from torch.distributed import DistError, TCPStore  # only here: the settings are sound

        with contextlib.suppress(DistError):  # it has gone
            TCPStore(self.place.host, self.place.port, None, False, timedelta(seconds=GREET_SECONDS),
                     wait_for_workers=False)
            self.answered = True

    def is_a_meeting(self, patience_seconds: float) -> bool:
        self.thread.join(patience_seconds)
        return self.answered


def meet(places: tuple[Place, ...]) -> tuple[Place, bool]:
    """The place to meet at, and whether this launcher is its host. Waits until there is one.

    Places at which another program listens are passed over.
    """
    waiting: dict[Place, Greeting] = {}
    own = [(turn * TURN_SECONDS, place) for turn, place in enumerate(places) if place.is_here()]
    started = told = time.monotonic()
    while True:
        for place in places:
            if not place.answers():
                continue
            greeting = waiting.get(place) or Greeting(place)
            if greeting.is_a_meeting(0.0 if place in waiting else GREET_SECONDS):
                return place, False
            if not greeting.thread.is_alive():
                waiting.pop(place, None)
            elif place not in waiting:
                waiting[place] = greeting
                Console().warn(f"{place}: another program listens there, which is passed over")
        now = time.monotonic()
        for after, place in own:
            if now - started >= after and place.is_free():
                return place, True
        if now - told >= TELL_SECONDS:
            Console().line(f"no answer yet from {', '.join(map(str, places))}; trying again")
            told = now
        time.sleep(0.2)
