"""How a process ends: the message, the exit code, and the record that outlives the launcher.

torchrun reports 1 for every code but 0, so the code is also written to `exit.json` next to the checkpoints.
"""

import json
import traceback
from pathlib import Path

import torch.distributed as dist

from megatron_ltd.errors import EXIT_INTERNAL, EXIT_PEER_LOST, UserError
from megatron_ltd.log import Console

RECORD_NAME = "exit.json"
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Socket Timeout",
              "gloo/transport", "Application timeout", "Broken pipe")


def clear_exit_record(save_dir: str | None) -> None:
    """Remove the record of the previous run."""
    if save_dir is not None:
        (Path(save_dir) / RECORD_NAME).unlink(missing_ok=True)


def write_exit_record(save_dir: str | None, code: int, step: int | None, reason: str) -> None:
    """Write `exit.json` to the folder of checkpoints, if there is one.

    Args:
        step: the last step of the run; None if it ended with an error.
    """
    if save_dir is None or not Path(save_dir).is_dir():
        return
    record = Path(save_dir) / RECORD_NAME
    temporary = record.with_name(RECORD_NAME + ".tmp")
    try:
        temporary.write_text(json.dumps({"code": code, "step": step, "reason": reason}) + "\n")
        temporary.replace(record)
    except OSError as error:
        Console().warn(f"{record} could not be written: {error}")


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error only means that another process is gone."""
    while error is not None:
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST_PEER):
            return True
        error = error.__cause__
    return False


def report(error: Exception, rank: int, world_size: int, save_dir: str | None) -> int:
    """Print what ended this process and return its exit code; an error common to all processes is printed once."""
    name = f"rank {rank}: " if world_size > 1 else ""
    if isinstance(error, UserError):
        everywhere = error.everywhere or not name
        if rank == 0 or not everywhere:
            Console().error(f"{'' if everywhere else name}{type(error).__name__}: {error}")
            write_exit_record(save_dir, error.exit_code, None, str(error))
        return error.exit_code
    if name and lost_peer(error):
        Console().error(f"{name}stopped, since another process failed or did not answer in time; its own message says "
                        f"why ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
        if save_dir is not None and not (Path(save_dir) / RECORD_NAME).exists():
            write_exit_record(save_dir, EXIT_PEER_LOST, None, "another process failed or did not answer in time")
        return EXIT_PEER_LOST
    Console().error(f"{name}internal error\n{''.join(traceback.format_exception(error))}")
    write_exit_record(save_dir, EXIT_INTERNAL, None, repr(error))
    return EXIT_INTERNAL
