"""A run that starts from a store copies the checkpoint to a local folder first, and goes on as if that were given."""

import fcntl
import hashlib
from dataclasses import replace
from pathlib import Path

from megatron_ltd.checkpoint.durable import NewFile, is_url, make_folder, reason, remove_folder, rename_folder
from megatron_ltd.checkpoint.layout import (
    checkpoint_path,
    checkpoints,
    clear_leftovers,
    defect,
    partial_path,
    write_tracker,
)
from megatron_ltd.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megatron_ltd.checkpoint.store import Store, copied, newest_step
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.log import Console


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
            copied(copy.read, file.write)
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
