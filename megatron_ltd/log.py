"""One line to the console from one rank, warnings that are said once, and how sizes are written."""

import os
import shutil
import sys
from typing import TextIO

_said: set[str] = set()
_CLEAR_LINE = "\r\x1b[K"


class Console:
    """Prints for the one rank that speaks; silent on every other.

    A stream that cannot be written, such as a pipe whose reader has gone or a file on a full disk, does not end the
    program: it is given up with one warning.

    Args:
        speaks: whether this process prints.
    """

    def __init__(self, speaks: bool = True):
        self.speaks = speaks

    def line(self, text: str) -> None:
        if self.speaks:
            _print(text, sys.stdout)

    @property
    def on_terminal(self) -> bool:
        return self.speaks and sys.stdout.isatty()

    def status(self, text: str) -> None:
        """Show a line at the bottom of the terminal until the next one is printed."""
        if self.on_terminal:
            columns = shutil.get_terminal_size().columns
            _print(_CLEAR_LINE + text[:columns - 1], sys.stdout, end="")

    def warn(self, text: str) -> None:
        if self.speaks:
            _print(f"WARNING: {text}", sys.stderr)

    def error(self, text: str) -> None:
        if self.speaks:
            _print(text, sys.stderr)

    def warn_once(self, text: str) -> None:
        if text not in _said:
            _said.add(text)
            self.warn(text)


def _print(text: str, stream: TextIO, end: str = "\n") -> None:
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)  # names of files need not be text
    try:
        over_status = end and stream.isatty()
        print(_CLEAR_LINE + text if over_status else text, file=stream, end=end, flush=True)
    except OSError as error:
        # The text is still in the stream's buffer and would be tried again when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if stream is not sys.stderr:
            Console().warn(f"standard output is given up for this run: {error}")


def duration_text(seconds: float) -> str:
    """A time in its two largest units: `2 h 13 min`."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def size_text(size_bytes: float) -> str:
    """A size in the unit that suits it: `512 B`, `1.5 GiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, (int(size_bytes).bit_length() - 1) // 10))
    return f"{size_bytes / 1024**power:.4g} {units[power]}"
