"""Errors a user can cause and repair, and the exit codes by which a scheduler tells them apart.

A message names the setting or file and its value, the constraint, and the remedy. Everything else that is
raised in this package is a bug in it.
"""

from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A problem in what the user gave us; printed as one message without a traceback."""

    exit_code = 70

    everywhere = True
    """Every process raises the same error, so one of them may speak for all."""

    step: int | None = None
    """The run's last step; None for an error before the first."""


class ConfigError(UserError):
    """Settings that contradict each other, the mesh, or the machine."""

    exit_code = 20


class DataError(UserError):
    """A corpus, tokenizer or task file that is missing, damaged, or does not fit the run."""

    exit_code = 21


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, incompatible, or cannot be written."""

    exit_code = 22


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that no run can load, so an older one may do in its place."""


class DivergenceError(UserError):
    """A loss, gradient or loss scale from which training cannot continue."""

    exit_code = 30


class HardwareError(UserError):
    """A machine that computes numbers which another computation does not confirm; it should be replaced."""

    exit_code = 50


EXIT_COMPLETE = 0
EXIT_ON_SIGNAL = 10
"""Stopped by a signal after saving; the same command continues the run."""
EXIT_ON_INTERVAL = 11
"""`--exit-interval` or `--exit-duration-in-mins` reached after saving; the same command continues the run."""
EXIT_PEER_LOST = 40
"""Another process failed or did not answer in time; its own message says why."""
EXIT_INTERNAL = 70


class LostPeerError(CheckpointError):
    """Another process failed or did not answer during a load or a save, so no checkpoint is to blame."""

    exit_code = EXIT_PEER_LOST
    everywhere = False


def flag_name(field: str) -> str:
    """The flag of a setting, by which messages name it."""
    return "--" + field.replace("_", "-")


_NO_MEMORY = ("out of memory", "can't allocate memory")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from; torch's pipeline wraps what a stage raises."""
    while error is not None:
        yield error
        error = error.__cause__


def matches(error: BaseException, kinds: set[str], signs: Iterable[str]) -> bool:
    """Whether an error is of one of these classes, given by name since torch may not be loaded, or says one of these
    words."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return not names.isdisjoint(kinds) or any(sign in str(error) for sign in signs)


def memory_shortage(error: BaseException | None) -> str | None:
    """What asked for memory that the machine does not have, if that is what an error means."""
    for cause in causes(error):
        if matches(cause, {"OutOfMemoryError", "MemoryError"}, _NO_MEMORY):
            return (str(cause).splitlines() or [type(cause).__name__])[0]
    return None
