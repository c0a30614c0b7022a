"""Finished checkpoints are copied to a store by a thread of rank 0 while training goes on."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ltd.checkpoint.durable import open_regular, reason
from megatron_ltd.checkpoint.layout import TRACKER_NAME
from megatron_ltd.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megatron_ltd.checkpoint.store import Store, copied
from megatron_ltd.errors import CheckpointError
from megatron_ltd.log import Console, size_text


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
                digest = copied(file.read, copy.write)
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
