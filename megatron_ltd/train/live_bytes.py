"""Counts the bytes of tensors that are alive while code runs: what a process needs, without the allocator's share."""

import time
import weakref
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRACE = 0.05
"""Seconds in which what looks like a new peak may prove to be memory about to be freed."""


class LiveBytes(TorchDispatchMode):
    """Adds up, after every operation, the storages seen so far that are still alive.

    Each storage tells when it dies, so an operation costs the same however many are alive.

    Args:
        smallest: bytes of the smallest storage that counts.
    """

    def __init__(self, smallest: int = 1) -> None:
        super().__init__()
        self.smallest, self.peak = smallest, 0
        self.operation = ""
        """After which the peak was reached."""
        self._now = 0
        self._threads = False
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage], StorageWeakRef]] = {}
        self._died: list[int] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would hide every call from its compiler, which costs as much as the counting."""
        return False

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP2 frees and fills storages without an operation."""
            found = self._resize(storage, size)
            if storage._cdata in self._alive:
                self._note(storage)
            return found

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._forget()
        for part in (*args, *(kwargs or {}).values(), result):
            for tensor in (part,) if isinstance(part, torch.Tensor) else tree_leaves(part):
                tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                    self._note(tensor.untyped_storage())
        if func.namespace == "c10d":
            self._threads = dist.get_backend() == dist.Backend.GLOO
        if self._now > self.peak and (now := self._settled()) > self.peak:
            self.peak, self.operation = now, str(func)
        return result

    def _settled(self) -> int:
        """Bytes alive once gloo's threads, if there are any, have let go of what they are done with.

        They wake who waits for a collective before they give up its tensors, and the interpreter is told later still.
        """
        until = time.monotonic() + GRACE * self._threads
        while (now := sum(size for size, _, freed in self._alive.values() if not freed.expired())) > self.peak:
            if time.monotonic() >= until:
                break
            time.sleep(0.001)
        return now

    def _forget(self) -> None:
        """Storages that have died; whichever thread frees a storage says so."""
        while self._died:
            self._now -= self._alive.pop(self._died.pop())[0]

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        size = size if size >= self.smallest else 0
        if key not in self._alive:
            self._alive[key] = size, weakref.ref(storage, lambda _: self._died.append(key)), StorageWeakRef(storage)
            self._now += size
        elif self._alive[key][0] != size:
            self._now += size - self._alive[key][0]
            self._alive[key] = size, *self._alive[key][1:]
