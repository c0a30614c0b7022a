"""How a process ends: the message, the exit code, and the record that outlives the launcher.

torchrun reports 1 for every code but 0, so the code is also written to `exit.json` next to the checkpoints, and told to
`examples/launch.py`. `attempts.jsonl` beside it has a line for each attempt that trained: how the one before it ended.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from megatron_ltd.checkpoint.layout import checkpoint_path
from megatron_ltd.config.files import CheckpointConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import (
    EXIT_COMPLETE,
    EXIT_INTERNAL,
    EXIT_ON_INTERVAL,
    EXIT_ON_SIGNAL,
    EXIT_PEER_LOST,
    LostPeerError,
    UserError,
    causes,
    matches,
    memory_shortage,
)
from megatron_ltd.log import Console
from megatron_ltd.train.process.environment import Launch, tell_launcher

RECORD_NAME = "exit.json"
ATTEMPTS_NAME = "attempts.jsonl"
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Wait timeout",
              "Socket Timeout", "gloo/transport", "Application timeout", "Broken pipe")

LESS_MEMORY = (
    "A process needs less with a smaller --micro-batch-size, --recompute-granularity full, --use-distributed-optimizer "
    "or --data-parallel-sharding-strategy optim_grads_params with more processes, tensor or pipeline parallelism, or "
    "a smaller model. tools/plan_run.py, with the flags of the run, says where memory goes and which layouts fit.")


def leave(code: int) -> NoReturn:
    """End this process with an exit code: handlers of `atexit` run, Python's finalization does not.

    A thread of gloo may hold a tensor of the last collective a little longer. If it releases the tensor while Python is
    finalized, the process is aborted (SIGABRT), and a finished run counts as failed. Caches of DTensor keep the process
    groups alive, so their threads cannot be joined instead.
    """
    if "torch" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


def take_exit_record(save_dir: str | None) -> dict[str, Any] | None:
    """Remove the record of the attempt before this one, and return it; None if it left none, as one that was killed."""
    if save_dir is None:
        return None
    record = Path(save_dir) / RECORD_NAME
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):  # not there, or damaged
        found = None
    record.unlink(missing_ok=True)
    return found if isinstance(found, dict) else None


def note_attempt(save_dir: str | None, step: int, world_size: int, previous: dict[str, Any] | None) -> None:
    """Add this attempt to `attempts.jsonl` in the folder of checkpoints, with the time in seconds since 1970.

    Args:
        step: from which it goes on; 0 from scratch.
        previous: the record of the attempt before it.
    """
    if save_dir is None:
        return
    path = Path(save_dir) / ATTEMPTS_NAME
    line = {"time": time.time(), "step": step, "processes": world_size, "previous": previous}
    try:
        with path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    except OSError as error:
        Console().warn(f"{path} could not be written: {error}")


def write_exit_record(save_dir: str | None, code: int, step: int | None, reason: str) -> None:
    """Write `exit.json` to the folder of checkpoints, if there is one.

    Args:
        step: the last step of the run; None if it ended before its first.
    """
    if save_dir is None or not Path(save_dir).is_dir():
        return
    record = Path(save_dir) / RECORD_NAME
    temporary = record.with_name(f"{RECORD_NAME}.{socket.gethostname()}-{os.getpid()}.tmp")  # several may end at once
    try:
        temporary.write_text(json.dumps({"code": code, "step": step, "reason": reason}) + "\n")
        temporary.replace(record)
    except OSError as error:
        Console().warn(f"{record} could not be written: {error}")


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error only means that another process is gone."""
    return any(matches(cause, {"DistError", "LostPeerError"}, _LOST_PEER) for cause in causes(error))


def report(error: Exception, rank: int, world_size: int, save_dir: str | None) -> int:
    """Say what ended this process and return its exit code; an error common to all processes is printed once."""
    name = f"rank {rank}: " if world_size > 1 else ""
    if isinstance(error, UserError) and not isinstance(error, LostPeerError):
        everywhere = error.everywhere or not name
        text = f"{'' if everywhere else name}{type(error).__name__}: {error}"
        speaks = rank == 0 or not everywhere
        if speaks:
            Console().error(text)
            write_exit_record(save_dir, error.exit_code, error.step, str(error))
        tell_launcher(error.exit_code, text, printed=speaks)
        return error.exit_code
    if name and lost_peer(error):
        text = (f"{name}stopped, since another process failed or did not answer in time; its own message says why "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})")
        if save_dir is not None and not (Path(save_dir) / RECORD_NAME).exists():
            write_exit_record(save_dir, EXIT_PEER_LOST, None, "another process failed or did not answer in time")
        code = EXIT_PEER_LOST
    else:
        shortage = memory_shortage(error)
        text = f"{name}internal error\n{''.join(traceback.format_exception(error))}"
        if shortage is not None:
            text = f"{name}memory ran out {_place(error)}: {shortage}\n{LESS_MEMORY}"
        write_exit_record(save_dir, EXIT_INTERNAL, None, repr(error) if shortage is None else text)
        code = EXIT_INTERNAL
    Console().error(text)
    tell_launcher(code, text, printed=True)
    return code


def _place(error: Exception) -> str:
    """The innermost function of this package that an error passed."""
    package = str(Path(__file__).resolve().parents[2]) + os.sep
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
    return f"in {ours[-1].name} ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else "outside the package"


def end(config: RunConfig, code: int, place: Launch, *, first_step: int, step: int, total_steps: int) -> None:
    """Say how a run ended that no error ended, and how it goes on; called on every process, before any exits.

    Args:
        first_step: the step from which this process went on; 0 from scratch.
    """
    text = ending(config, code, first_step=first_step, step=step, total_steps=total_steps)
    if place.rank == 0:
        reasons = {EXIT_COMPLETE: "complete", EXIT_ON_SIGNAL: "stopped by a signal",
                   EXIT_ON_INTERVAL: "interval or duration reached"}
        write_exit_record(config.checkpoint.save, code, step, reasons[code])
        Console().line(text)
    tell_launcher(code, text, printed=place.rank == 0)


def ending(config: RunConfig, code: int, *, first_step: int, step: int, total_steps: int) -> str:
    """Why a run ended, where its last checkpoint is, and which command goes on."""
    training, settings, at = config.training, config.checkpoint, f"step {step} of {total_steps}"
    if code == EXIT_COMPLETE and step < total_steps:
        at += ", where early stopping ended it"
    if code == EXIT_COMPLETE and step == first_step:
        return (f"already complete: {settings.load} holds {at}; no step was trained. For a longer run raise its "
                "length, for a new one give another --save and --load")
    if code == EXIT_COMPLETE:
        lines = [f"complete: {at}"]
    elif code == EXIT_ON_SIGNAL:
        lines = [f"stopped by a signal after {at} (exit code {code})"]
    else:
        planned = training.exit_interval is not None and step % training.exit_interval == 0
        why = f"--exit-interval = {training.exit_interval}" if planned else \
            f"--exit-duration-in-mins = {training.exit_duration_in_mins}"
        lines = [f"stopped as planned after {at}: {why} (exit code {code})"]
    if settings.save is None:
        lines.append("nothing was saved, since --save is not given")
    else:
        lines.append(f"newest checkpoint: {checkpoint_path(Path(settings.save), step)}")
    if code != EXIT_COMPLETE and settings.save is not None:
        lines.append(f"to continue: {_continuation(settings)}")
    return "\n".join(lines)


def _continuation(settings: CheckpointConfig) -> str:
    """The command that continues a run, told by its difference from the one that started it."""
    assert settings.save is not None
    resumes = settings.load is not None and Path(settings.load).resolve() == Path(settings.save).resolve()
    changes = [] if resumes else [f"with --load {settings.save}"]
    changes += [f"without {name}" for name, given in (
        ("--finetune", settings.finetune and settings.pretrained_checkpoint is None),
        ("--ckpt-step", settings.ckpt_step is not None)) if given]
    return "the same command " + (" and ".join(changes) if changes else "again")
