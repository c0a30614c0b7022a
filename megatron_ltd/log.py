"""One line to the console from one rank, and warnings that are said once."""

import sys

_said: set[str] = set()


class Console:
    """Prints for the one rank that speaks; silent on every other.

    Args:
        speaks: whether this process prints.
    """

    def __init__(self, speaks: bool = True):
        self.speaks = speaks

    def line(self, text: str) -> None:
        if self.speaks:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        if self.speaks:
            print(f"WARNING: {text}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        if self.speaks:
            print(text, file=sys.stderr, flush=True)

    def warn_once(self, text: str) -> None:
        if text not in _said:
            _said.add(text)
            self.warn(text)
