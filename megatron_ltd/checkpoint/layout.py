"""Where checkpoints lie and which one to load.

    SAVE/latest_checkpointed_iteration.txt     the step to continue from
    SAVE/iter_0001000/manifest.json            written last: with it the checkpoint is complete
    SAVE/iter_0001000/rank-00000.safetensors   ...
    SAVE/.tmp-iter_0002000/                    being written, or left by a run that was killed
    SAVE/.old-iter_0001000/                    put aside while a new checkpoint of the same step takes its place
    SAVE/.trash-iter_0000500/                  being deleted

The tracker decides which checkpoint is loaded, so a user may edit it to go back; if it is missing or names nothing
that exists, the newest complete checkpoint is taken and a warning says so.
"""

import os
import re
import stat
from pathlib import Path

from megatron_ltd.checkpoint.durable import read_file, remove_folder, rename_folder, write_file
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.errors import CheckpointError
from megatron_ltd.log import Console

TRACKER_NAME = "latest_checkpointed_iteration.txt"
KEPT = 2
"""Complete checkpoints that retention never deletes, the newest ones."""
_STEP = re.compile(r"(?:\.old-)?iter_([0-9]{7,15})")
_SHOWN_STEPS = 5


def checkpoint_path(save_dir: Path, step: int) -> Path:
    """The folder of a published checkpoint."""
    return save_dir / f"iter_{step:07d}"


def partial_path(save_dir: Path, step: int) -> Path:
    """The folder in which a checkpoint is written."""
    return save_dir / f".tmp-iter_{step:07d}"


def set_aside_path(save_dir: Path, step: int) -> Path:
    """The folder of a checkpoint that is being replaced by another of the same step."""
    return save_dir / f".old-iter_{step:07d}"


def write_tracker(save_dir: Path, step: int) -> None:
    """Make a step the one to continue from, in one durable step."""
    write_file(save_dir / TRACKER_NAME, f"{step}\n".encode())


def read_tracker(save_dir: Path) -> int | None:
    """The step to continue from; None if there is no tracker.

    Raises:
        CheckpointError: the tracker is no file with a step in it.
    """
    path = save_dir / TRACKER_NAME
    if not os.path.lexists(path):
        return None
    text = read_file(path, 64).decode("ascii", errors="replace").strip()
    if not re.fullmatch("[0-9]{1,15}", text):
        raise CheckpointError(f"{path} holds {text!r}, expected the step of a checkpoint")
    return int(text)


def checkpoints(save_dir: Path) -> dict[int, Path]:
    """Folders of checkpoints by ascending step, complete or not; links are not followed."""
    found: dict[int, Path] = {}
    for name in sorted(os.listdir(save_dir), reverse=True):  # `iter_...` after `.old-iter_...`
        match = _STEP.fullmatch(name)
        if match and _is_folder(save_dir / name):
            step = int(match.group(1))
            if name == checkpoint_path(save_dir, step).name or step not in found:
                found[step] = save_dir / name
    return dict(sorted(found.items()))


def defect(checkpoint: Path) -> str | None:
    """Why a checkpoint is not complete, or None if it is; checks the manifest and the sizes of files."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    for name, facts in manifest.files.items():
        try:
            entry = os.lstat(checkpoint / name)
        except OSError as error:
            return f"{checkpoint / name}: {error.strerror}"
        if not stat.S_ISREG(entry.st_mode) or entry.st_size != facts.size_bytes:
            return f"{checkpoint / name} has {entry.st_size} bytes, expected {facts.size_bytes}"
    return None


def find_checkpoint(load_dir: Path, step: int | None = None, console: Console | None = None) -> Path:
    """The checkpoint to load.

    Args:
        step: this one rather than what the tracker says.

    Raises:
        CheckpointError: there is none, or not that step. A damaged checkpoint that was asked for, by `step` or by
            the tracker, is returned: loading it explains what is wrong with it.
    """
    console = console or Console()
    if not load_dir.is_dir():
        raise CheckpointError(f"--load = {load_dir} is not a folder. Give the folder that --save named.")
    found = checkpoints(load_dir)
    if step is not None:
        if step not in found:
            raise CheckpointError(f"--ckpt-step = {step} is not in {load_dir}. {_which(found)}")
        return found[step]
    try:
        tracked = read_tracker(load_dir)
        complaint = f"{load_dir / TRACKER_NAME} is missing"
        if tracked is not None:
            complaint = f"{load_dir / TRACKER_NAME} names step {tracked}, which is not there"
    except CheckpointError as error:
        tracked, complaint = None, str(error)
    if tracked in found:
        return found[tracked]
    for newest in sorted(found, reverse=True):
        problem = defect(found[newest])
        if problem is None:
            console.warn(f"{complaint}; loading the newest complete checkpoint, {found[newest].name}")
            return found[newest]
        console.warn(f"{found[newest]} is not complete and is passed over: {problem}")
    raise CheckpointError(f"--load = {load_dir} holds no complete checkpoint ({complaint}). Give the folder that "
                          "--save named. To start afresh, train without --load, or with an empty folder that is also "
                          "--save.")


def older_than(checkpoint: Path) -> list[Path]:
    """The checkpoints of earlier steps in the same folder, complete or not, newest first."""
    ascending = list(checkpoints(checkpoint.parent).values())
    return ascending[:ascending.index(checkpoint)][::-1]


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is missing or has no trace of a checkpoint, so that a run may start afresh in it."""
    if not os.path.lexists(folder):
        return True
    return folder.is_dir() and not checkpoints(folder) and not os.path.lexists(folder / TRACKER_NAME)


def clear_leftovers(save_dir: Path) -> None:
    """Remove what a killed run left half-written or half-deleted, and put back what it had only set aside."""
    for name in sorted(os.listdir(save_dir)):
        path = save_dir / name
        if not _is_folder(path):
            continue
        if name.startswith(".old-iter_") and _STEP.fullmatch(name):
            final = save_dir / name.removeprefix(".old-")
            if os.path.lexists(final):
                remove_folder(path)
            else:
                rename_folder(path, final)
        elif name.startswith((".tmp-iter_", ".trash-")):
            remove_folder(path)


def superseded(save_dir: Path, step: int, retain_interval: int, kept: int = KEPT) -> list[Path]:
    """Checkpoints that may be deleted after one of `step` was published, oldest first.

    Kept are the newest complete checkpoints, multiples of the interval, checkpoints of later steps (of a run that this
    one went back from), and everything that is not a complete checkpoint.
    """
    found, newest = [], 0
    for s, path in reversed(checkpoints(save_dir).items()):
        # Of those that stay, a long run has many: they are not looked at with each save.
        stays = s > step or (newest >= kept and s % retain_interval == 0)
        if stays or defect(path) is not None:
            continue
        if newest >= kept:
            found.append(path)
        newest += 1
    return found[::-1]


def _is_folder(path: Path) -> bool:
    """Whether it is a folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _which(found: dict[int, Path]) -> str:
    if not found:
        return "It holds no checkpoints."
    newest = ", ".join(str(step) for step in list(found)[-_SHOWN_STEPS:])
    return f"Newest steps there: {newest}."
