"""Checkpoints that are copied to another folder behind training, and runs that start from there.

The stores are fsspec's own memory, a folder, and stores that fail or are slow.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from megatron_ltd.checkpoint.io import load
from megatron_ltd.checkpoint.layout import checkpoint_path, checkpoints, find_checkpoint
from megatron_ltd.checkpoint.remote import download, with_local_checkpoint
from megatron_ltd.checkpoint.store import Store, newest_step
from megatron_ltd.checkpoint.uploader import Uploader
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.errors import CheckpointError, ConfigError
from megatron_ltd.log import Console
from tests.runnable_settings import with_settings

QUIET = Console(speaks=False)


class FailingStore(MemoryFileSystem):
    """Refuses to write what a test names."""

    protocol = "failing"
    refused = ""

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode and self.refused and self.refused in path:
            raise ConnectionError("the store is away")
        return super()._open(path, mode, **kwargs)


class SlowStore(MemoryFileSystem):
    """Writes no tensors before it may."""

    protocol = "slow"
    is_reached, may_write = threading.Event(), threading.Event()

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode and path.endswith(".safetensors"):
            self.is_reached.set()
            assert self.may_write.wait(60)
        return super()._open(path, mode, **kwargs)


@pytest.fixture(autouse=True, scope="module")
def stores() -> None:
    for kind in (FailingStore, SlowStore):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.fixture
def url() -> Iterator[str]:
    yield f"memory://{uuid.uuid4().hex}"
    MemoryFileSystem.store.clear()
    FailingStore.refused = ""


def values(mark: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3, 2), float(mark))}


def save(writer: CheckpointWriter, step: int) -> None:
    writer.save(step, values(step), config={}, counters={})


def loaded(folder: Path) -> float:
    tensors = values(0.0)
    load(find_checkpoint(folder, console=QUIET), tensors, None)
    return tensors["model.weight"][0, 0].item()


def uploading(folder: Path, url: str, retained: int | None = None, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(folder, None, uploader=Uploader(url, retained, Console()), console=QUIET, **options)


def wait_for_copies(writer: CheckpointWriter) -> None:
    """Wait until nothing is being copied, whether or not it has failed."""
    assert writer.uploader is not None
    while not writer.uploader.idle():
        time.sleep(0.01)


@pytest.mark.parametrize("background", [False, True])
def test_copies_are_complete_equal_and_as_many_as_wanted(tmp_path: Path, url: str, background: bool) -> None:
    writer = uploading(tmp_path / "own", url, retained=2, background=background)
    for step in (1, 2, 3):
        save(writer, step)
        writer.wait()
        wait_for_copies(writer)
    writer.finish()
    store = Store.open("--load", url)
    assert store.steps() == [2, 3] and newest_step(store) == 3 and newest_step(store, 2) == 2
    for step in (2, 3):
        for path in checkpoint_path(tmp_path / "own", step).iterdir():
            assert store.files.cat_file(store.path(path.parent.name, path.name)) == path.read_bytes()
    for step in (3, 2):
        download(store, step, tmp_path / "cache")
        assert list(checkpoints(tmp_path / "cache")) == [step] and loaded(tmp_path / "cache") == step


def test_a_path_is_a_store_too(tmp_path: Path) -> None:
    writer = uploading(tmp_path / "own", str(tmp_path / "mounted"))
    save(writer, 1)
    writer.finish()
    assert loaded(tmp_path / "mounted") == 1


def test_a_copy_that_fails_is_told_and_made_again_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"failing://{uuid.uuid4().hex}"
    writer = uploading(tmp_path, url)
    FailingStore.refused = "iter_0000001/manifest"
    save(writer, 1)
    wait_for_copies(writer)
    said = capsys.readouterr().err
    assert "iter_0000001 was not copied" in said and "the store is away" in said, said
    assert Store.open("--load", url).steps() == []
    FailingStore.refused = ""
    writer.finish()
    assert Store.open("--load", url).steps() == [1]


def test_a_store_that_cannot_be_written_to_is_found_before_training() -> None:
    FailingStore.refused = "probe"
    with pytest.raises(CheckpointError, match="--upload = failing://x cannot be written to: .*the store is away"):
        Uploader("failing://x", None, QUIET)
    FailingStore.refused = ""


def test_a_slow_store_neither_holds_up_a_save_nor_loses_what_it_is_reading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"slow://{uuid.uuid4().hex}"
    SlowStore.is_reached.clear()
    SlowStore.may_write.clear()
    writer = CheckpointWriter(tmp_path, None, uploader=Uploader(url, None, Console()), retain_interval=100, retained=1)
    save(writer, 1)
    assert SlowStore.is_reached.wait(60)  # only then is the first one being read
    for step in (2, 3, 4):
        save(writer, step)  # would take 60 s and fail if it waited
    assert list(checkpoints(tmp_path)) == [1, 4]
    SlowStore.may_write.set()
    writer.finish()
    assert Store.open("--load", url).steps() == [1, 4]
    assert "iter_0000003 is not copied" in capsys.readouterr().out


def test_damage_in_the_store_is_found_before_anything_is_loaded(tmp_path: Path, url: str) -> None:
    writer = uploading(tmp_path / "own", url)
    save(writer, 1)
    writer.finish()
    store = Store.open("--load", url)
    [name] = [path for path in store.files.ls(store.path("iter_0000001"), detail=False) if path.endswith("tensors")]
    data = bytearray(store.files.cat_file(name))
    data[-1] ^= 1
    store.files.pipe_file(name, bytes(data))
    with pytest.raises(CheckpointError, match="is damaged: .* expected .*--ckpt-step loads an older one"):
        download(store, 1, tmp_path / "cache")
    assert not list(checkpoints(tmp_path / "cache"))


def test_what_cannot_be_loaded_is_refused_with_its_reason(tmp_path: Path, url: str) -> None:
    def of(**settings: Any) -> Any:
        return with_local_checkpoint(with_settings(**settings)).checkpoint

    with pytest.raises(ConfigError, match="--load = nothing://x cannot be used: .*megatron_ltd.cloud"):
        of(load="nothing://x")
    with pytest.raises(ConfigError, match="--upload = nothing://x cannot be used"):
        of(upload="nothing://x", save="x")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        of(load=url, save=str(tmp_path))
    assert of(load=url, upload=url, save=str(tmp_path)).load == str(tmp_path)  # starts afresh
    writer = uploading(tmp_path / "other", url)
    save(writer, 3)
    writer.finish()
    with pytest.raises(CheckpointError, match="--ckpt-step = 2 is not in .*; complete there: 3"):
        of(load=url, ckpt_step=2)
    own = tmp_path / "own"
    found = of(load=url, upload=url, save=str(own)).load
    assert loaded(Path(found)) == 3 and Path(found).is_relative_to(own)
    writer = CheckpointWriter(own, None, console=QUIET)
    save(writer, 4)  # newer than the store
    assert of(load=url, upload=url, save=str(own)).load == str(own)
