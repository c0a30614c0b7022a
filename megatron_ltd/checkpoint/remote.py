"""Checkpoints in another folder: an object store by its `fsspec` URL, or a mounted one by its path.

    URL/iter_0001000/rank-00000.safetensors    ...
    URL/iter_0001000/manifest.json             copied last: with it the copy is complete
    URL/latest_checkpointed_iteration.txt      the newest complete copy

Finished checkpoints are copied by a thread of rank 0 while training goes on. A run that starts from a URL copies the
checkpoint to a local folder first and goes on as if that had been given.
"""

import fcntl
import hashlib
import importlib
import posixpath
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.durable import (
    NewFile,
    is_url,
    make_folder,
    open_regular,
    reason,
    remove_folder,
    rename_folder,
)
from megatron_ltd.checkpoint.layout import (
    TRACKER_NAME,
    checkpoint_path,
    checkpoints,
    clear_leftovers,
    defect,
    partial_path,
    write_tracker,
)
from megatron_ltd.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megatron_ltd.config import RunConfig
from megatron_ltd.errors import CheckpointError, ConfigError
from megatron_ltd.log import Console, size_text

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
        return [step for step in steps if self.files.exists(self.path(_name(step), MANIFEST_NAME))]

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
        folder = self.path(_name(step))
        if self.files.exists(posixpath.join(folder, MANIFEST_NAME)):
            self.files.rm_file(posixpath.join(folder, MANIFEST_NAME))
        if self.files.exists(folder):
            self.files.rm(folder, recursive=True)


def _name(step: int) -> str:
    return checkpoint_path(Path(), step).name


class Uploader:
    """Copies finished checkpoints behind training, one at a time. Where they are finished faster than they can be
    copied, those in between are left out. A copy that fails is told and does not end the run.

    Args:
        url: of the folder.
        retained: how many copies stay, the newest; None for all.

    Raises:
        ConfigError: the URL cannot be used.
        CheckpointError: nothing can be written there.
    """

    def __init__(self, url: str, retained: int | None, console: Console):
        self.store, self.retained, self.console = Store.open("--upload", url), retained, console
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-uploader")
        self._lock = threading.Lock()
        self._next: Path | None = None
        self._current: Path | None = None
        self._failed: Path | None = None
        try:
            self.store.make_folder()
            self.store.write(b"probe", ".probe")
            self.store.files.rm_file(self.store.path(".probe"))
        except Exception as error:  # every store has its own
            raise CheckpointError(f"--upload = {url} cannot be written to: {reason(error)}") from error

    def add(self, checkpoint: Path) -> None:
        """Copy this checkpoint after the one that is being copied."""
        with self._lock:
            skipped, self._next, self._failed = self._next, checkpoint, None
            if self._current is None and skipped is None:
                self._thread.submit(self._run)
        if skipped is not None:
            self.console.line(f"{skipped.name} is not copied to {self.store.url}, which is slower than the saves")

    def holds(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is still to be read, so that it must not be deleted."""
        with self._lock:
            return checkpoint in (self._next, self._current)

    def idle(self) -> bool:
        with self._lock:
            return self._next is None and self._current is None

    def try_again(self) -> None:
        """Copy the last checkpoint once more if that failed."""
        with self._lock:
            failed = self._failed
        if failed is not None:
            self.add(failed)

    def _run(self) -> None:
        while True:
            with self._lock:
                current = self._current = self._next
                self._next = None
            if current is None:
                return
            problem = None
            try:
                self._copy(current)
            except Exception as error:  # every store has its own, and none may end the run
                problem = reason(error)
            if problem is not None:
                self.console.warn(f"{current} was not copied to {self.store.url}: {problem}. The run goes on and tries "
                                  "again with the next checkpoint or when it ends")
            with self._lock:
                self._current, self._failed = None, current if problem is not None else None

    def _copy(self, checkpoint: Path) -> None:
        manifest = read_manifest(checkpoint)
        with open_regular(checkpoint / MANIFEST_NAME) as file:
            manifest_bytes = file.read()
        self.store.remove(manifest.step)
        self.store.make_folder(checkpoint.name)
        for name, facts in manifest.files.items():
            with open_regular(checkpoint / name) as file, \
                    self.store.files.open(self.store.path(checkpoint.name, name), "wb") as copy:
                digest = _copied(lambda file=file: file.read(_PIECE_BYTES), copy.write)  # type: ignore[misc]
            if digest != facts.sha256:
                raise CheckpointError(f"{checkpoint / name} has SHA-256 {digest}, expected {facts.sha256}")
        self.store.write(manifest_bytes, checkpoint.name, MANIFEST_NAME)
        self.store.write(f"{manifest.step}\n".encode(), TRACKER_NAME)
        size = sum(facts.size_bytes for facts in manifest.files.values())
        self.console.line(f"copied {checkpoint.name} to {self.store.url}: {size_text(size)}")
        for step in self._superseded(manifest.step):
            self.store.remove(step)

    def _superseded(self, newest: int) -> list[int]:
        steps = [step for step in self.store.steps() if step <= newest]
        return [] if self.retained is None else steps[:-self.retained]


def _copied(read: Callable[[], bytes], write: Callable[[bytes], object]) -> str:
    """Copy piece by piece; the SHA-256 of all."""
    digest = hashlib.sha256()
    for piece in _pieces(read):
        digest.update(piece)
        write(piece)
    return digest.hexdigest()


def _pieces(read: Callable[[], bytes]) -> Iterator[bytes]:
    while piece := read():
        yield piece


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


def download(store: Store, step: int, cache: Path) -> None:
    """Copy a checkpoint to a local folder, verified by its manifest, and make it the one to load there. Processes that
    ask for the same at once wait for the first; what the folder held before is deleted.

    Raises:
        CheckpointError: it cannot be read or written, or is damaged.
    """
    final, partial = checkpoint_path(cache, step), partial_path(cache, step)
    try:
        make_folder(cache)
        with (cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.is_dir() or defect(final) is not None:
                clear_leftovers(cache)
                for old in checkpoints(cache).values():
                    remove_folder(old)
                Console().line(f"copying {store.url}/{final.name} to {cache}")
                make_folder(partial)
                _fetch(store, final.name, partial)
                rename_folder(partial, final)
            write_tracker(cache, step)
    except CheckpointError:
        raise
    except Exception as error:  # every store has its own
        raise CheckpointError(f"--load = {store.url}: {final.name} could not be copied to {cache}: {reason(error)}"
                              ) from error


def _fetch(store: Store, name: str, folder: Path) -> None:
    with NewFile(folder / MANIFEST_NAME) as file:
        file.write(store.files.cat_file(store.path(name, MANIFEST_NAME)))
        file.finish()
    for file_name, facts in read_manifest(folder).files.items():
        with NewFile(folder / file_name) as file, store.files.open(store.path(name, file_name), "rb") as copy:
            _copied(lambda copy=copy: copy.read(_PIECE_BYTES), file.write)  # type: ignore[misc]
            found = file.finish()
        if found != facts:
            raise CheckpointError(f"{store.url}/{name}/{file_name} is damaged: {found.size_bytes} bytes with SHA-256 "
                                  f"{found.sha256}, expected {facts.size_bytes} with {facts.sha256}; --ckpt-step loads "
                                  "an older one")


def with_local_checkpoint(config: RunConfig) -> RunConfig:
    """The settings with local folders in place of URLs to load from; their checkpoints are copied there first.

    Where --load is --upload, so that one command both starts and resumes a run, the run continues from --save if that
    holds as new a checkpoint, and starts afresh if neither holds one.

    Raises:
        ConfigError: a URL is of a kind that is not known or not installed.
        CheckpointError: there is nothing to load, or it cannot be copied.
    """
    settings = config.checkpoint
    if settings.upload is not None:
        Store.open("--upload", settings.upload)
    if settings.pretrained_checkpoint is not None and is_url(settings.pretrained_checkpoint):
        store = Store.open("--pretrained-checkpoint", settings.pretrained_checkpoint)
        settings = replace(settings, pretrained_checkpoint=_local(store, None, settings.save))
    if settings.load is not None and is_url(settings.load):
        store = Store.open("--load", settings.load)
        own = settings.load == settings.upload and settings.ckpt_step is None
        step = newest_step(store, settings.ckpt_step)
        if own and settings.save is not None and (step is None or _newest_complete(Path(settings.save)) >= step):
            settings = replace(settings, load=settings.save)
        else:
            settings = replace(settings, load=_local(store, step, settings.save))
    return replace(config, checkpoint=settings)


def _newest_complete(folder: Path) -> int:
    if not folder.is_dir():
        return -1
    return max((step for step, path in checkpoints(folder).items() if defect(path) is None), default=-1)


def _local(store: Store, step: int | None, save: str | None) -> str:
    """The local folder with a copy of the checkpoint: beside the run's own, which all hosts share, or in the home
    folder."""
    step = newest_step(store) if step is None else step
    if step is None:
        raise CheckpointError(f"{store.url} holds no complete checkpoint; give the URL that --upload named")
    name = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    cache = (Path.home() / ".cache" / "megatron_ltd" if save is None else Path(save) / "loaded") / name
    download(store, step, cache)
    return str(cache)
