"""Ranks tell each other what happened before any of them acts on it, in JSON rather than pickled objects.

A failure on one rank is a failure on all of them, with that rank's reason: no rank waits at a barrier for one that
gave up, and none continues on a checkpoint that another could not read or write.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ltd.checkpoint.durable import reason
from megatron_ltd.errors import CheckpointError, LostPeerError
from megatron_ltd.parallel import agreement

T = TypeVar("T")

SHOWN_PROBLEMS = 10
"""Problems listed in one message; the rest are counted."""


def checkpoint_group(timeout: timedelta) -> dist.ProcessGroup | None:
    """All ranks over gloo, apart from training's collectives; None without a process group.

    Args:
        timeout: of one exchange; also how much later one rank may finish writing its file than another.
    """
    if not dist.is_initialized():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def rank_in(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None and not dist.is_initialized() else dist.get_rank(group)


def size_of(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None and not dist.is_initialized() else dist.get_world_size(group)


def gather_json(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The values of all ranks, in order of rank; a value is anything JSON can hold.

    Raises:
        LostPeerError: a rank was lost or did not answer within the group's timeout.
    """
    try:
        return agreement.gather_json(value, group)
    except (RuntimeError, ValueError) as error:
        raise LostPeerError(f"lost contact with another rank at a checkpoint: {reason(error)}") from error


def raise_problems(headline: str, problems: Sequence[str], kind: type[CheckpointError] = CheckpointError) -> None:
    """Raise all problems in one message if there are any.

    Raises:
        kind: with the headline, the first problems and the number of the others.
    """
    if not problems:
        return
    lines = [f"  {line}" for problem in problems[:SHOWN_PROBLEMS] for line in problem.splitlines()]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - SHOWN_PROBLEMS} more")
    raise kind("\n".join([f"{headline}:", *lines]))


def all_or_none(headline: str, action: Callable[[], T], group: dist.ProcessGroup | None,
                kind: type[CheckpointError] = CheckpointError) -> T:
    """Run an action that may fail on every rank and return its value if it succeeded on all of them.

    Raises:
        kind: on every rank, if it failed on any, naming rank and reason. Only errors of the system and
            `CheckpointError` are failures of this kind; others propagate.
    """
    problem = None
    try:
        value = action()
    except (OSError, CheckpointError) as error:
        problem = reason(error)
    answers = gather_json(problem, group)
    alone = len(answers) == 1
    raise_problems(headline, [p if alone else f"rank {r}: {p}" for r, p in enumerate(answers) if p is not None],
                   kind)
    return value


def all_see(headline: str, folder: Path, flag: str, group: dist.ProcessGroup | None) -> None:
    """Make sure that a folder that rank 0 knows of is there on every rank.

    Raises:
        CheckpointError: on every rank, if it is not there on one of them.
    """

    def see() -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not there: {flag} must be on a file system that all ranks share")

    all_or_none(headline, see, group)
