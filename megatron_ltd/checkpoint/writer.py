"""Saves checkpoints, at once or in the background, so that each one appears completely or not at all.

    all ranks   write .tmp-iter_N/rank-r.safetensors, flushed to the device
    all ranks   tell each other whether they succeeded
    rank 0      writes manifest.json, renames .tmp-iter_N to iter_N, replaces the tracker, deletes what may go
    all ranks   tell each other whether rank 0 succeeded

A failure on any rank is raised on all of them; what was published before stays as it was.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from megatron_ltd.checkpoint.agreement import all_or_none, all_see, gather_json, raise_problems, rank_in
from megatron_ltd.checkpoint.durable import (
    fsync_folder,
    make_folder,
    reason,
    remove_folder,
    rename_folder,
    write_file,
)
from megatron_ltd.checkpoint.layout import (
    KEPT,
    checkpoint_path,
    clear_leftovers,
    partial_path,
    set_aside_path,
    superseded,
    write_tracker,
)
from megatron_ltd.checkpoint.manifest import Manifest, versions, write_manifest
from megatron_ltd.checkpoint.storage import LazyPlanner, SafetensorsWriter
from megatron_ltd.checkpoint.uploader import Uploader
from megatron_ltd.config.files import CheckpointConfig
from megatron_ltd.errors import CheckpointError, LostPeerError
from megatron_ltd.log import Console, size_text

_POLL_SECONDS = 0.2


class CheckpointWriter:
    """Writes the checkpoints of one run; every method is called by all ranks at the same point.

    Args:
        save_dir: on a file system that all ranks share.
        group: all ranks, over gloo, used by nothing else (`agreement.checkpoint_group`); None without ranks.
        background: `save` returns as soon as the tensors are copied to host memory, and a thread does the rest.
        retain_interval: delete checkpoints of steps that are no multiples of it, except the newest ones.
        retained: how many of the newest.
        console: of rank 0; says what was saved, and what went wrong without harm to any checkpoint. Without one only
            the latter is said.
        uploader: of rank 0; copies what is published. None on the others, or if nothing is copied.
    """

    def __init__(self, save_dir: Path, group: dist.ProcessGroup | None, background: bool = False,
                 retain_interval: int | None = None, console: Console | None = None, retained: int = KEPT,
                 uploader: Uploader | None = None):
        self.save_dir = save_dir
        self.group, self.leads = group, rank_in(group) == 0
        self.retain_interval, self.retained = retain_interval, retained
        self.console, self.progress = console or Console(self.leads), console or Console(False)
        self.uploader = uploader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer",
                                          initializer=_on_the_same_device()) if background else None
        self._stager: DefaultStager | None = None
        self._pending: Future[Path] | None = None

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], *, config: dict[str, Any],
             counters: dict[str, Any], read: Callable[[str], torch.Tensor] | None = None) -> None:
        """Save a checkpoint, after the previous one is finished.

        Args:
            tensors: by global name; those that this rank holds a part of. DTensors are saved by their owners,
                plain tensors and replicas once. They may change as soon as this returns.
            config: `RunConfig.to_dict()`.
            counters: what else a resumed run needs; plain JSON values, equal on all ranks.
            read: gives the values of a tensor; `tensors` are then on the device "meta", and memory holds one at a time.

        Raises:
            CheckpointError: on all ranks, if this or the previous checkpoint could not be written.
        """
        self.wait()
        json.dumps([config, counters], allow_nan=False)  # a mistake shows here, on every rank, and not in rank 0 alone
        held = {name: tensor.detach() for name, tensor in tensors.items()}
        plain = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner = plain if read is None else LazyPlanner(read)
        manifest = Manifest(step=step, config=config, counters=counters, tensors={}, files={}, versions=versions())
        if self._thread is None:
            self._write(held, planner, manifest)
        else:
            self._pending = self._thread.submit(self._write, self._staged(held), planner, manifest)

    def wait(self) -> Path | None:
        """Wait for the save in the background, if there is one, and return what it published.

        Raises:
            CheckpointError: on all ranks, if it failed.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def finish(self) -> None:
        """Wait, also for the last copy, and end the thread; all ranks together.

        Raises:
            CheckpointError: on all ranks, if the last save failed.
        """
        try:
            self.wait()
            self._wait_for_copies()
        finally:
            self.close()

    def close(self) -> None:
        """Wait for the save in the background and end the thread; also where other ranks have failed.

        Raises:
            CheckpointError: the save failed.
        """
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._stager is not None:
                self._stager.close()

    def _wait_for_copies(self) -> None:
        """All ranks wait together, in exchanges that are short, since a copy may take longer than their timeout."""
        if self.uploader is not None:
            self.uploader.try_again()
        while not gather_json(self.uploader is None or self.uploader.idle(), self.group)[0]:
            time.sleep(_POLL_SECONDS)

    def _staged(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in host memory, which is kept from one save to the next, but not by torch 2.11."""
        if self._stager is None:
            cuda = any(tensor.is_cuda for tensor in tensors.values())
            options = StagingOptions(use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False,
                                     use_non_blocking_copy=cuda)
            self._stager = DefaultStager(options)
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)
        if not getattr(self._stager._state_dict_stager, "_deepcopy_dispatch", True):
            self._stager = None  # torch 2.11 has closed it, so that it cannot copy again
        return staged

    def _write(self, tensors: dict[str, torch.Tensor], planner: SavePlanner, manifest: Manifest) -> Path:
        step, started = manifest.step, time.monotonic()
        partial = partial_path(self.save_dir, step)
        headline = f"the checkpoint of step {step} was not saved to {self.save_dir}; earlier ones are intact"
        try:
            all_or_none(headline, lambda: self._prepare(partial), self.group)
            all_see(headline, partial, "--save", self.group)
            storage = SafetensorsWriter(partial)
            with dcp_errors(headline):
                dcp_save(dict(tensors), storage_writer=storage, process_group=self.group, planner=planner)
            complete = replace(manifest, tensors=storage.tensors, files=storage.files)
            all_or_none(headline, lambda: self._publish(partial, complete), self.group)
        except CheckpointError:
            self._remove([partial])
            raise
        path, size = checkpoint_path(self.save_dir, step), sum(file.size_bytes for file in storage.files.values())
        self.progress.line(f"saved {path}: step {step}, {size_text(size)}, {time.monotonic() - started:.1f} s")
        if self.uploader is not None:
            self.uploader.add(path)
        self._remove(self._superseded(step))
        return path

    def _prepare(self, partial: Path) -> None:
        if not self.leads:
            return
        make_folder(self.save_dir)
        clear_leftovers(self.save_dir)
        os.mkdir(partial)
        fsync_folder(self.save_dir)

    def _publish(self, partial: Path, manifest: Manifest) -> None:
        if not self.leads:
            return
        write_manifest(partial, manifest)
        final = checkpoint_path(self.save_dir, manifest.step)
        if os.path.lexists(final):
            rename_folder(final, set_aside_path(self.save_dir, manifest.step))
        rename_folder(partial, final)
        write_tracker(self.save_dir, manifest.step)

    def _superseded(self, step: int) -> Iterator[Path]:
        """What the new checkpoint replaces."""
        yield set_aside_path(self.save_dir, step)
        if self.retain_interval is not None:
            yield from (path for path in superseded(self.save_dir, step, self.retain_interval, self.retained)
                        if self.uploader is None or not self.uploader.holds(path))

    def _remove(self, folders: Iterable[Path]) -> None:
        """Free the space of checkpoints that are not needed; one that cannot be deleted does not stop a run."""
        if not self.leads:
            return
        try:
            for folder in folders:
                if os.path.lexists(folder):
                    remove_folder(folder)
        except OSError as error:
            self.console.warn(f"an old or unfinished checkpoint in {self.save_dir} could not be deleted: "
                              f"{reason(error)}")


def _on_the_same_device() -> Callable[[], None]:
    """What a thread does first, so that it acts on this one's GPU. One that has chosen none acts on the host's first:
    to free pinned memory, it would take some hundred megabytes there."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def choose() -> None:
        if device is not None:
            torch.cuda.set_device(device)

    return choose


def probe_writable(save_dir: Path, group: dist.ProcessGroup | None) -> None:
    """Find out before the first step whether every rank can save.

    Raises:
        CheckpointError: on all ranks, if one of them cannot create, flush, rename and remove a file there.
    """

    def probe() -> None:
        make_folder(save_dir)
        path = save_dir / f".probe-{rank_in(group)}"
        write_file(path, bytes(4096))
        os.unlink(path)

    all_or_none(f"--save = {save_dir} cannot be written to", probe, group)


def open_uploader(settings: CheckpointConfig, group: dist.ProcessGroup | None, console: Console) -> Uploader | None:
    """What copies checkpoints to --upload, on rank 0.

    Raises:
        CheckpointError: on all ranks, if nothing can be written there.
    """
    if settings.upload is None:
        return None
    url, retained = settings.upload, settings.upload_retain
    return all_or_none("checkpoints cannot be copied",
                       lambda: Uploader(url, retained, console) if rank_in(group) == 0 else None, group)


@contextmanager
def dcp_errors(headline: str) -> Iterator[None]:
    """Turn the errors of torch.distributed.checkpoint into `CheckpointError` with rank and reason.

    Raises:
        CheckpointError: on all ranks, if a rank failed.
        LostPeerError: a rank was lost.
    """
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings() if alone else nullcontext():
            if alone:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        reasons = {rank: reason(error) for rank, (error, _) in sorted(failure.failures.items())}
        raise_problems(headline, [said if alone else f"rank {rank}: {said}" for rank, said in reasons.items()])
    except RuntimeError as error:
        raise LostPeerError(f"{headline}:\n  lost contact with another rank: {reason(error)}") from error
