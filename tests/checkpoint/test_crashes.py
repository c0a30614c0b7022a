"""Whatever stops a save, at whatever moment, a complete checkpoint with the right numbers is left."""

import errno
import os
import shutil
import stat
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from megatron_ltd.checkpoint import writer as writer_module
from megatron_ltd.checkpoint.io import load
from megatron_ltd.checkpoint.layout import find_checkpoint, read_tracker
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.errors import CheckpointError
from megatron_ltd.log import Console
from tests.checkpoint.faults import count_operations, intercepted, killed_at, refused_at
from tests.checkpoint.layouts import save_plain
from tests.gloo import launch_ranks

QUIET = Console(speaks=False)


def values(mark: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3, 2), mark), "optimizer.exp_avg.weight": torch.full((3, 2), -mark)}


def loaded_mark(save_dir: Path) -> float:
    """Which save one gets by loading; fails if it gets a mixture."""
    tensors = values(0.0)
    load(find_checkpoint(save_dir, console=QUIET), tensors, None)
    mark = tensors["model.weight"][0, 0].item()
    assert all(torch.equal(tensor, values(mark)[name]) for name, tensor in tensors.items())
    return mark


def new_step(save_dir: Path) -> None:
    save_plain(save_dir, 2, values(2.0))


def same_step(save_dir: Path) -> None:
    save_plain(save_dir, 1, values(2.0))


def with_retention(save_dir: Path) -> None:
    save_plain(save_dir, 4, values(2.0), retain_interval=100)


def in_background(save_dir: Path) -> None:
    writer = CheckpointWriter(save_dir, None, background=True)
    writer.save(2, values(2.0), config={}, counters={})
    writer.close()


PREPARATION: dict[str, tuple[int, ...]] = {"new_step": (1,), "same_step": (1,), "with_retention": (1, 2, 3)}
ACTIONS = {action.__name__: action for action in (new_step, same_step, with_retention)}


def prepared(folder: Path, case: str) -> Path:
    """A folder with earlier checkpoints, all of which hold the mark 1."""
    for step in PREPARATION[case]:
        save_plain(folder, step, values(1.0))
    return folder


def kill_everywhere(rank: int, ranks: int, init_method: str, root: Path, case: str) -> list[float]:
    """Kill a save before each of its operations, hence after each but the last; returns what then was loaded."""
    template = prepared(root / "template", case)
    action: Callable[[Path], None] = ACTIONS[case]
    marks: list[float] = []
    while True:
        folder = root / str(len(marks))
        shutil.copytree(template, folder)
        if not killed_at(len(marks) + 1, partial(action, folder)):
            return marks
        marks.append(loaded_mark(folder))
        action(folder)  # the next save copes with what is left
        assert loaded_mark(folder) == 2.0
        assert not [name for name in os.listdir(folder) if name.startswith((".tmp-iter", ".old-", ".trash-"))]


@pytest.mark.parametrize("case", list(ACTIONS))
def test_a_save_killed_between_any_two_operations_leaves_a_complete_checkpoint(tmp_path: Path, case: str) -> None:
    [marks] = launch_ranks(kill_everywhere, 1, tmp_path, case)
    assert len(marks) > 20
    assert set(marks) == {1.0, 2.0}
    assert marks == sorted(marks)  # once the new checkpoint can be loaded it stays


@pytest.mark.parametrize("case", list(ACTIONS))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_save_refused_at_any_operation_reports_it_and_the_next_one_succeeds(
    tmp_path: Path, case: str, code: int,
) -> None:
    template = prepared(tmp_path / "template", case)
    action = ACTIONS[case]
    shutil.copytree(template, tmp_path / "counted")
    operations = count_operations(lambda: action(tmp_path / "counted"))
    assert operations > 20
    silent = 0
    for n in range(1, operations + 1):
        folder = tmp_path / str(n)
        shutil.copytree(template, folder)
        try:
            with refused_at(n, code):
                action(folder)
            silent += 1
        except CheckpointError as error:
            assert os.strerror(code) in str(error)
        assert loaded_mark(folder) in (1.0, 2.0)
        action(folder)
        assert loaded_mark(folder) == 2.0
    # Only the deletion of a checkpoint that is no longer needed may fail without failing the save.
    assert (silent > 0) == (case != "new_step")


def test_a_failed_save_removes_its_files_and_leaves_the_tracker(tmp_path: Path) -> None:
    save_plain(tmp_path, 1, values(1.0))
    before = sorted(os.listdir(tmp_path))

    def no_space(name: str, args: tuple[Any, ...]) -> None:
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with intercepted(no_space), pytest.raises(CheckpointError) as caught:
        save_plain(tmp_path, 2, values(2.0))
    assert "step 2" in str(caught.value)
    assert f"No space left on device ({tmp_path}/.tmp-iter_0000002/rank-00000.safetensors)" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
    assert read_tracker(tmp_path) == 1


def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, None, background=True)
    with refused_at(4):
        writer.save(1, values(1.0), config={}, counters={})
        with pytest.raises(CheckpointError, match="No space left on device"):
            writer.wait()
    writer.save(2, values(2.0), config={}, counters={})
    assert writer.wait() == tmp_path / "iter_0000002"
    assert writer.wait() is None
    writer.close()
    assert loaded_mark(tmp_path) == 2.0


class OfTorch211(DefaultStager):
    """Closed after every copy, whose memory it no longer holds."""

    def stage(self, *args: Any, **kwargs: Any) -> Any:
        staged = super().stage(*args, **kwargs)
        self._state_dict_stager.close()
        return staged


def test_every_save_in_the_background_is_copied_also_where_torch_closes_its_stager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer_module, "DefaultStager", OfTorch211)
    writer = CheckpointWriter(tmp_path, None, background=True)
    for step in (1, 2, 3):
        writer.save(step, values(float(step)), config={}, counters={})
    writer.close()
    assert loaded_mark(tmp_path) == 3.0


@pytest.mark.parametrize("save", [new_step, same_step, in_background])
def test_names_appear_only_after_their_contents_are_on_the_device(
    tmp_path: Path, save: Callable[[Path], None],
) -> None:
    """Replay the operations of a save: a power failure may drop whatever was not flushed."""
    save_plain(tmp_path, 1, values(1.0))
    unflushed_data: set[str] = set()
    unflushed_names: dict[str, set[str]] = {}
    opened: dict[int, str] = {}
    renames = []

    def on(name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            opened[result] = os.path.abspath(args[0])
            if args[1] & os.O_CREAT:
                unflushed_names.setdefault(os.path.dirname(opened[result]), set()).add(opened[result])
        elif name == "write":
            unflushed_data.add(opened[args[0]])
        elif name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
            unflushed_names.pop(opened[args[0]], None)
        elif name == "fsync":
            unflushed_data.discard(opened[args[0]])
        elif name in ("rename", "replace"):
            source = os.path.abspath(args[0])
            renames.append((os.path.basename(args[0]), os.path.basename(args[1])))
            assert not [path for path in unflushed_data if path.startswith(source)], renames
            assert not [path for path in unflushed_names if path.startswith(source)], renames
            unflushed_names.setdefault(os.path.dirname(source), set()).add(str(args[1]))

    with intercepted(lambda name, args: None, on):
        save(tmp_path)
    assert not unflushed_data
    assert not unflushed_names
    published = [pair for pair in renames if pair[1].startswith("iter_")]
    assert len(published) == 1
    tracker = [pair for pair in renames if pair[1] == "latest_checkpointed_iteration.txt"]
    assert renames.index(tracker[0]) > renames.index(published[0])


def test_what_the_background_frees_is_freed_on_the_process_s_own_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In CUDA each thread has a current device, at first the host's first one, and whatever it does there takes some
    hundred megabytes. With torch 2.11 the writer's thread is the last to hold the copies, which are pinned."""
    chosen, freed_on, returned = threading.local(), [], threading.Event()

    def current_device() -> int:
        return getattr(chosen, "device", 0)

    class Watched(OfTorch211):
        def stage(self, *args: Any, **kwargs: Any) -> Any:
            staged = super().stage(*args, **kwargs)
            for tensor in staged.values():
                weakref.finalize(tensor, lambda: freed_on.append((threading.current_thread(), current_device())))
            return staged

    def save_later(*args: Any, **kwargs: Any) -> None:
        assert returned.wait(60)  # until the main thread has let go of the copies
        dcp_save(*args, **kwargs)

    monkeypatch.setattr(writer_module, "DefaultStager", Watched)
    monkeypatch.setattr(writer_module, "dcp_save", save_later)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", current_device)
    monkeypatch.setattr(torch.cuda, "set_device", partial(setattr, chosen, "device"))
    torch.cuda.set_device(3)
    writer = CheckpointWriter(tmp_path, None, background=True)
    writer.save(1, values(1.0), config={}, counters={})
    returned.set()
    writer.close()
    assert [device for _, device in freed_on] == [3, 3]
    assert threading.main_thread() not in {thread for thread, _ in freed_on}


def test_a_run_on_cpus_leaves_the_gpus_of_its_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning needs a context on one of them, for which it may have no memory left."""
    full = mock.Mock(side_effect=RuntimeError("CUDA error: out of memory"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", full)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", full)
    writer = CheckpointWriter(tmp_path, None, background=True)
    writer.save(1, values(1.0), config={}, counters={})
    writer.close()
    assert loaded_mark(tmp_path) == 1.0 and not full.called
