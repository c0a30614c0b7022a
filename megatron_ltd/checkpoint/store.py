"""A folder of checkpoints elsewhere: an object store by its `fsspec` URL, or a mounted one by its path.

    URL/iter_0001000/rank-00000.safetensors    ...
    URL/iter_0001000/manifest.json             copied last: with it the copy is complete
    URL/latest_checkpointed_iteration.txt      the newest complete copy
"""

import hashlib
import importlib
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.durable import reason
from megatron_ltd.checkpoint.layout import TRACKER_NAME, checkpoint_path
from megatron_ltd.checkpoint.manifest import MANIFEST_NAME
from megatron_ltd.errors import CheckpointError, ConfigError

_STEP = re.compile(r"iter_([0-9]{7,15})")
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Store:
    """A folder of checkpoints that `fsspec` can reach."""

    url: str
    files: Any
    root: str

    @classmethod
    def open(cls, flag: str, url: str) -> "Store":
        """Raises:
            ConfigError: the URL is of a kind that is not known or not installed.
        """
        fsspec = importlib.import_module("fsspec")
        try:
            files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{flag} = {url} cannot be used: {error}. pip install 'megatron_ltd[cloud]' brings s3:// "
                              "and gs://; a mounted store is given by its path") from error
        return cls(url, files, root.rstrip("/"))

    def path(self, *parts: str) -> str:
        return posixpath.join(self.root, *parts)

    def steps(self) -> list[int]:
        """Those with a manifest, ascending."""
        found = [_STEP.fullmatch(posixpath.basename(name.rstrip("/"))) for name in self._names()]
        steps = sorted(int(match[1]) for match in found if match)
        return [step for step in steps if self.files.exists(self.path(folder_name(step), MANIFEST_NAME))]

    def _names(self) -> list[str]:
        try:
            return list(self.files.ls(self.root, detail=False))
        except FileNotFoundError:
            return []

    def write(self, data: bytes, *parts: str) -> None:
        """Write a small file."""
        with self.files.open(self.path(*parts), "wb") as file:
            file.write(data)

    def make_folder(self, *parts: str) -> None:
        self.files.makedirs(self.path(*parts), exist_ok=True)

    def remove(self, step: int) -> None:
        """Delete a copy, its manifest first, so that what remains after a failure is not taken for one."""
        folder = self.path(folder_name(step))
        if self.files.exists(posixpath.join(folder, MANIFEST_NAME)):
            self.files.rm_file(posixpath.join(folder, MANIFEST_NAME))
        if self.files.exists(folder):
            self.files.rm(folder, recursive=True)


def folder_name(step: int) -> str:
    return checkpoint_path(Path(), step).name


def copied(read: Callable[[int], bytes], write: Callable[[bytes], object]) -> str:
    """Copy piece by piece; the SHA-256 of all.

    Args:
        read: gives at most so many bytes, none at the end.
    """
    digest = hashlib.sha256()
    for piece in iter(lambda: read(_PIECE_BYTES), b""):
        digest.update(piece)
        write(piece)
    return digest.hexdigest()


def newest_step(store: Store, wanted: int | None = None) -> int | None:
    """The step to start from, None if the store holds no complete checkpoint.

    Args:
        wanted: this step rather than the newest.

    Raises:
        CheckpointError: that step is not there, or the store cannot be read.
    """
    try:
        steps = store.steps()
        tracker = store.path(TRACKER_NAME)
        tracked = store.files.cat_file(tracker).strip() if store.files.exists(tracker) else b""
    except Exception as error:  # every store has its own
        raise CheckpointError(f"--load = {store.url} cannot be read: {reason(error)}") from error
    if wanted is not None and wanted not in steps:
        raise CheckpointError(f"--ckpt-step = {wanted} is not in {store.url}; complete there: "
                              f"{', '.join(map(str, steps)) or 'none'}")
    if wanted is not None or not steps:
        return wanted
    return int(tracked) if tracked.isdigit() and int(tracked) in steps else steps[-1]
