"""Counts the bytes of tensors that are alive while code runs: what a process needs, without the allocator's share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Adds up, after every operation, the storages seen so far that are still alive.

    Args:
        smallest: bytes of the smallest storage that counts.
    """

    def __init__(self, smallest: int = 1) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}
        self.smallest, self.peak = smallest, 0
        self.sizes: list[int] = []
        """Of the storages at the peak."""
        self.operation = ""
        """After which the peak was reached."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage)
        self.storages = {key: reference for key, reference in self.storages.items() if not reference.expired()}
        alive = map(torch.UntypedStorage._new_with_weak_ptr, self.storages)
        sizes = [storage.nbytes() for storage in alive if storage is not None]  # another thread may have freed it
        now = sum(size for size in sizes if size >= self.smallest)
        if now > self.peak:
            self.peak, self.sizes, self.operation = now, sizes, str(func)
        return result
