"""Processes of one measurement that run at the same time."""

from collections.abc import Sequence
from multiprocessing.process import BaseProcess


def run_together(processes: Sequence[BaseProcess], what: str) -> None:
    """Start processes, and wait until all have ended.

    Raises:
        SystemExit: one of them failed.
    """
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{what}: a process failed; exit codes {[process.exitcode for process in processes]}")
