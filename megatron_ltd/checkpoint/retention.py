"""Deletes checkpoints that a run no longer needs.

Kept are the newest two complete checkpoints, multiples of the retain interval, checkpoints of later steps than the
one just saved (of a run that this one went back from), and everything that is not a complete checkpoint.
"""

from pathlib import Path

from megatron_ltd.checkpoint.durable import remove_folder
from megatron_ltd.checkpoint.layout import checkpoints, defect

KEPT = 2


def superseded(save_dir: Path, step: int, retain_interval: int, kept: int = KEPT) -> list[Path]:
    """Checkpoints that may go after one of `step` was published, oldest first."""
    complete = [(s, path) for s, path in checkpoints(save_dir).items() if s <= step and defect(path) is None]
    return [path for s, path in complete[:-kept] if s % retain_interval]


def retain(save_dir: Path, step: int, retain_interval: int, kept: int = KEPT) -> None:
    """Delete superseded checkpoints; links are never followed."""
    for path in superseded(save_dir, step, retain_interval, kept):
        remove_folder(path)
