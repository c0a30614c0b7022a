"""Faults at the n-th file-system operation of a save: the process dies, or the system refuses."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
"""Everything of `os` that changes a file system or makes a change durable."""

KILLED = 9


@contextmanager
def intercepted(before: Callable[[str, tuple[Any, ...]], None],
                after: Callable[[str, tuple[Any, ...], Any], None] = lambda name, args, result: None
                ) -> Iterator[None]:
    """Call `before` and `after` around each operation."""
    originals = {name: getattr(os, name) for name in OPERATIONS}

    def wrap(name: str) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            before(name, args)
            result = originals[name](*args, **kwargs)
            after(name, args, result)
            return result
        return operation

    for name in OPERATIONS:
        setattr(os, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def count_operations(action: Callable[[], object]) -> int:
    seen = []
    with intercepted(lambda name, args: seen.append(name)):
        action()
    return len(seen)


@contextmanager
def refused_at(n: int, code: int = errno.ENOSPC) -> Iterator[None]:
    """The n-th operation fails with an error of the system."""
    seen = 0

    def refuse(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += 1
        if seen == n:
            raise OSError(code, os.strerror(code))

    with intercepted(refuse):
        yield


def killed_at(n: int, action: Callable[[], object]) -> bool:
    """Run an action in a forked process that dies before its n-th operation; whether it got that far."""
    child = os.fork()
    if child == 0:
        _die_at(n, action)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the child ended with {code}"
    return code == KILLED


def _die_at(n: int, action: Callable[[], object]) -> None:
    seen = 0

    def count(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += 1
        if seen == n:
            os._exit(KILLED)

    try:
        with intercepted(count):
            action()
    except BaseException:
        os._exit(1)
    os._exit(0)
