"""Who hangs, and where: the Python stacks of all processes in one file, once a collective has timed out.

    every process that waited      puts its stack into the store
    one on the same host           has a process that did not wait, and so hangs, write its own: a signal makes Python
                                   do so even inside a call into a library; a stopped process is continued first
    the first of those             collects them, writes the file, and names the processes that hang

The hung process writes into memory of its own, which others read by way of /proc, so there is nothing to clean up.
"""

import contextlib
import faulthandler
import os
import re
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ltd.errors import EXIT_PEER_LOST, causes
from megatron_ltd.log import Console
from megatron_ltd.train.process.exits import write_exit_record
from megatron_ltd.train.process.siblings import identity, started_at

if TYPE_CHECKING:
    from torch.distributed import Store

FILE_NAME = "stacks.txt"
_TIMED_OUT = ("Timed out waiting", "Wait timeout", "Application timeout", "Socket Timeout")
_REPORT_SECONDS, _DUMP_SECONDS, _PATIENCE_SECONDS = 1.0, 0.5, 4.0


def listen() -> int:
    """Have this process write its stacks when it is asked to; returns the number of the open file, 0 without Linux."""
    if not hasattr(os, "memfd_create"):
        return 0
    number = os.memfd_create("stacks")
    faulthandler.register(signal.SIGUSR2, file=number, all_threads=True)
    return number


def told(number: int) -> list[Any]:
    """What the other processes must know of this one.

    Args:
        number: of its file for stacks.
    """
    return [socket.gethostname(), *identity(), number]


def tell(error: Exception, rank: int, processes: Sequence[Sequence[Any]], store: "Store", save: str | None) -> None:
    """If an error says that others did not answer in time, name them. Takes a few seconds, also if the store is gone.

    Args:
        processes: what each has told.
        save: folder of the file; None: that of temporary files.
    """
    if any(sign in str(cause) for cause in causes(error) for sign in _TIMED_OUT):
        thread = threading.Thread(target=_tell_or_say, args=(error, rank, processes, store, save), daemon=True)
        thread.start()
        thread.join(_PATIENCE_SECONDS)


def _tell_or_say(error: Exception, rank: int, processes: Sequence[Sequence[Any]], store: "Store", save: str | None
                 ) -> None:
    try:
        _tell(error, rank, processes, store, save)
    except RuntimeError as lost:
        Console().warn(f"rank {rank}: the stacks of all processes cannot be collected, since their store is gone "
                       f"({str(lost).splitlines()[0]})")


def _tell(error: Exception, rank: int, processes: Sequence[Sequence[Any]], store: "Store", save: str | None) -> None:
    store.set(f"stack/{rank}", f"{_waits_in(error)}\n{''.join(traceback.format_exception(error))}")
    time.sleep(_REPORT_SECONDS)  # the others have waited as long, give or take a moment
    place = identity()[0]
    # One process asks for all, the others for those on their host. If each asked for all, the store would need longer
    # than anyone waits.
    writes = store.add("writer", 1) == 1
    silent = _silent(store, [peer for peer, (_, there, *_) in enumerate(processes) if writes or there == place])
    here = []
    for peer in silent:
        _, there, process, started, number = processes[peer]
        if there == place != "" and number and started_at(process) == started:
            here.append((peer, process, number))
    if here and store.add(f"asked/{place}", 1) == 1:
        for peer, text in _stacks_of(here).items():
            store.set(f"dump/{peer}", text)
    if not writes:
        return
    time.sleep(_DUMP_SECONDS * 2)
    keys = {peer: f"{'dump' if peer in silent else 'stack'}/{peer}" for peer in range(len(processes))}
    stacks = {peer: store.get(key).decode(errors="replace") for peer, key in keys.items()
              if peer not in silent or store.check([key])}
    _write(stacks, silent, processes, save)


def _silent(store: "Store", peers: Sequence[int]) -> list[int]:
    """Those of some processes whose stacks are not in the store, asked for by halves."""
    if not peers or store.check([f"stack/{peer}" for peer in peers]):
        return []
    if len(peers) == 1:
        return list(peers)
    return _silent(store, peers[:len(peers) // 2]) + _silent(store, peers[len(peers) // 2:])


def _stacks_of(hung: Sequence[tuple[int, int, int]]) -> Mapping[int, str]:
    """What processes of this host, given as (rank, process id, number of its file), write when they are asked."""
    for _, process, _ in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR2)
            os.kill(process, signal.SIGCONT)
    time.sleep(_DUMP_SECONDS)
    found = {}
    for rank, process, number in hung:
        with contextlib.suppress(OSError):
            found[rank] = Path(f"/proc/{process}/fd/{number}").read_text(errors="replace")
    return found


def _write(stacks: Mapping[int, str], silent: Sequence[int], processes: Sequence[Sequence[Any]], save: str | None
           ) -> None:
    """Write the file, and name the processes that hang."""
    sections = [f"===== rank {rank} on {process[0]}, process {process[2]}"
                f"{', which did not answer' if rank in silent else ''} =====\n{stacks.get(rank) or 'no stack'}\n"
                for rank, process in enumerate(processes)]
    path = Path(save or tempfile.gettempdir()) / FILE_NAME
    names = ", ".join(f"rank {rank} on {processes[rank][0]}" for rank in silent) or "no process"
    waits = next((text.splitlines()[0] for rank, text in sorted(stacks.items()) if rank not in silent), "")
    text = f"{names} did not answer in time, while the others waited in {waits}; the stacks of all are in {path}"
    try:
        path.write_text("\n".join(sections), encoding="utf-8")
    except OSError as error:
        text += f", which could not be written ({error.strerror})"
    Console().error(text)
    write_exit_record(save, EXIT_PEER_LOST, None, text)


def _waits_in(error: Exception) -> str:
    """The collective and the line of this package that called it."""
    frames = [frame for cause in causes(error) for frame in traceback.extract_tb(cause.__traceback__)]
    ours = [frame for frame in frames if re.search(r"megatron_ltd[/\\]", frame.filename)]
    last = ours[-1] if ours else frames[-1]
    inside = [frame.name for frame in frames[frames.index(last) + 1:] if "distributed" in frame.filename]
    called = next((name for name in inside if name != "wrapper"), "a collective")
    place = last.filename[last.filename.rfind("megatron_ltd"):]
    return f"{called} ({place}:{last.lineno}, {last.name})"
