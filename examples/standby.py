"""Processes that stand by with torch imported, so that a restart need not wait for imports.

torch's launcher starts every process of every attempt afresh, and most of what a small run then waits for is `import
torch`. Here that is done ahead, while the run is training: for each process of this node one stands by, and the next
attempt takes it over. It waits for its command and environment on its standard input, and ends if its launcher does.

    with Standby("megatron_ltd.pretrain_gpt", processes=8):
        torch.distributed.run.run(...)
"""

import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

IMPORTED = ("megatron_ltd.train.pretrain", "megatron_ltd.train.finetune", "megatron_ltd.lm_eval.run_tasks")
"""All but the recipe itself, which is run as `__main__`."""
LATER_SECONDS = 20.0
"""After the start of an attempt, whose own processes have the processors until then."""


class Standby(contextlib.AbstractContextManager["Standby"]):
    """Meanwhile torch's launcher takes its processes from those that stand by, where there are any.

    Args:
        module: that they will run; here only for whoever lists processes by name.
        processes: of this node.
        later: seconds from the start of an attempt until the processes of the next one are started.
    """

    def __init__(self, module: str, processes: int, later: float = LATER_SECONDS):
        self._module, self._processes, self._later = module, processes, later
        self._waiting: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Standby":
        standby, start = self, SubprocessHandler._popen
        self._start = start

        def take_or_start(handler: SubprocessHandler, words: tuple[str, ...],
                          environment: dict[str, str]) -> subprocess.Popen[bytes]:
            standby._prepare_later()
            is_plain = words[0] == sys.executable and handler._stdout is None and handler._stderr is None
            taken = standby.take(words[1:], environment) if is_plain else None
            return taken or start(handler, words, environment)

        SubprocessHandler._popen = take_or_start
        self.prepare()  # the launchers have yet to meet
        return self

    def __exit__(self, *_: object) -> None:
        SubprocessHandler._popen = self._start
        with self._lock:
            self._processes = 0
            if self._timer is not None:
                self._timer.cancel()
        for process in self._waiting:
            _end(process)

    def prepare(self) -> None:
        """Start as many processes as are missing."""
        with self._lock:
            self._waiting = [process for process in self._waiting if process.poll() is None]
            for _ in range(self._processes - len(self._waiting)):
                self._waiting.append(subprocess.Popen([sys.executable, "-u", "-m", "examples.standby", self._module],
                                                      stdin=subprocess.PIPE, start_new_session=True))

    def take(self, words: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[bytes] | None":
        """A process that stood by and is now what `python WORDS` would start; None if there is none."""
        order = json.dumps([words, environment]).encode() + b"\n"
        with self._lock:
            while self._waiting:
                process = self._waiting.pop()
                assert process.stdin is not None
                try:
                    process.stdin.write(order)
                    process.stdin.close()
                except OSError:  # it is gone
                    _end(process)
                else:
                    return process
        return None

    def _prepare_later(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(self._later, self.prepare)
            self._timer.daemon = True
            self._timer.start()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()


def stand_by() -> None:
    """Import what a run needs, and become the process that the launcher asks for."""
    for name in IMPORTED:
        importlib.import_module(name)
    order = sys.stdin.buffer.readline()
    if not order:  # the launcher has ended
        os._exit(0)
    words, environment = json.loads(order)
    os.environ.clear()
    os.environ.update(environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    module = words[words.index("-m") + 1:]
    sys.argv = module
    runpy.run_module(module[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    stand_by()
