"""What goes wrong on one rank is raised on all of them, with that rank's reason, and nobody waits for ever."""

import errno
import os
import resource
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megatron_ltd.checkpoint.agreement import checkpoint_group, gather_json
from megatron_ltd.checkpoint.io import agree_on_checkpoint, load
from megatron_ltd.checkpoint.layout import read_tracker
from megatron_ltd.checkpoint.writer import CheckpointWriter, probe_writable
from megatron_ltd.errors import CheckpointError, LostPeerError
from tests.checkpoint.faults import intercepted
from tests.checkpoint.layouts import plain, save_plain
from tests.gloo import observe_ranks, run_ranks


def rows(ranks: int, step: int) -> dict[str, torch.Tensor]:
    """A tensor of which every rank holds a row."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    full = torch.full((ranks, 1000), float(step))
    return {"model.weight": distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)}


def local_sum(tensors: dict[str, torch.Tensor]) -> float:
    weight = tensors["model.weight"]
    assert isinstance(weight, DTensor)
    return float(weight.to_local().sum())


def save_step(writer: CheckpointWriter, ranks: int, step: int) -> None:
    writer.save(step, rows(ranks, step), config={}, counters={})


def test_values_of_all_ranks_are_gathered_whatever_their_size() -> None:
    expected = [{"rank": rank, "text": "é" * 1000 * rank} for rank in range(3)]
    assert run_ranks(gather_of_rank, 3) == [expected] * 3


def gather_of_rank(rank: int, ranks: int) -> list[Any]:
    return gather_json({"rank": rank, "text": "é" * 1000 * rank}, dist.group.WORLD)


def refuse_writes_on_rank_1(rank: int, ranks: int, save_dir: Path, background: bool) -> tuple[str, list[str]]:
    group = checkpoint_group(timedelta(seconds=20))
    writer = CheckpointWriter(save_dir, group, background=background)
    save_step(writer, ranks, 1)
    writer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system refuses to write more
    try:
        save_step(writer, ranks, 2)
        writer.wait()
    except CheckpointError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(os.listdir(save_dir))
    dist.barrier()
    save_step(writer, ranks, 3)
    writer.close()
    return said, left


@pytest.mark.parametrize("background", [False, True])
def test_a_write_that_fails_on_one_rank_fails_on_all_and_the_next_save_succeeds(
    tmp_path: Path, background: bool,
) -> None:
    for said, left in run_ranks(refuse_writes_on_rank_1, 3, tmp_path, background):
        assert "the checkpoint of step 2 was not saved" in said
        assert f"rank 1: File too large ({tmp_path}/.tmp-iter_0000002/rank-00001.safetensors)" in said
        assert "rank 0" not in said and "rank 2" not in said
        assert left[-2:] == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert read_tracker(tmp_path) == 3


def die_while_writing(rank: int, ranks: int, save_dir: Path) -> str:
    group = checkpoint_group(timedelta(minutes=10))  # longer than this test may take
    writer = CheckpointWriter(save_dir, group)
    save_step(writer, ranks, 1)

    def die(name: str, args: tuple[Any, ...]) -> None:
        if name == "write" and rank == 1:
            os._exit(9)

    with intercepted(die), pytest.raises(LostPeerError) as caught:
        save_step(writer, ranks, 2)
    return str(caught.value)


def test_the_death_of_a_rank_during_a_save_is_noticed_by_the_others(tmp_path: Path) -> None:
    outcomes = observe_ranks(die_while_writing, 3, tmp_path)
    assert outcomes[1].exit_code == 9
    for outcome in (outcomes[0], outcomes[2]):
        assert not outcome.error, outcome.error
        assert "lost contact with another rank" in outcome.value
    tensors = {"model.weight": torch.zeros(3, 1000)}
    load(tmp_path / "iter_0000001", tensors, None)
    assert torch.equal(tensors["model.weight"], torch.ones(3, 1000))
    assert read_tracker(tmp_path) == 1


def stall(rank: int, ranks: int, save_dir: Path) -> str:
    group = checkpoint_group(timedelta(seconds=2))
    given_up = save_dir / "given-up"
    while rank == 1 and not given_up.exists():
        time.sleep(0.01)
    with pytest.raises(LostPeerError) as caught:
        save_step(CheckpointWriter(save_dir, group), ranks, 1)
    given_up.touch()
    return str(caught.value)


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_timeout(tmp_path: Path) -> None:
    for said in run_ranks(stall, 2, tmp_path, timeout=30):
        assert "lost contact with another rank" in said


def probe(rank: int, ranks: int, save_dir: Path, refusing: int | None) -> str:
    def read_only(name: str, args: tuple[Any, ...]) -> None:
        if rank == refusing and name == "open" and args[1] & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    with intercepted(read_only):
        try:
            probe_writable(save_dir, dist.group.WORLD)
        except CheckpointError as error:
            return str(error)
    return ""


def test_an_unwritable_folder_is_found_before_the_first_step(tmp_path: Path) -> None:
    assert run_ranks(probe, 2, tmp_path / "new" / "folder", None) == ["", ""]
    assert os.listdir(tmp_path / "new" / "folder") == []
    for said in run_ranks(probe, 2, tmp_path, 1):
        assert f"--save = {tmp_path} cannot be written to" in said
        assert f"rank 1: Read-only file system ({tmp_path}/.tmp-.probe-1)" in said
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        probe_writable(tmp_path / "file" / "save", None)


def load_into_other_shapes(rank: int, ranks: int, checkpoint: Path) -> tuple[str, float]:
    tensors = {"model.weight": torch.zeros(ranks, 1000)} if rank == 0 else {"model.wrong": torch.zeros(1)}
    try:
        load(checkpoint, tensors, dist.group.WORLD)
    except CheckpointError as error:
        return str(error), float(next(iter(tensors.values())).abs().sum())
    return "", -1.0


def test_a_misfit_on_one_rank_stops_all_before_anything_is_overwritten(tmp_path: Path) -> None:
    save_plain(tmp_path, 1, {"model.weight": torch.ones(2, 1000)})
    for said, total in run_ranks(load_into_other_shapes, 2, tmp_path / "iter_0000001"):
        assert said.endswith("does not fit this run:\n  model.wrong is not in the checkpoint")
        assert total == 0.0


def load_rows(rank: int, ranks: int, checkpoint: Path) -> tuple[str, float]:
    tensors = rows(ranks, 0)
    try:
        load(checkpoint, tensors, dist.group.WORLD)
    except CheckpointError as error:
        return str(error), local_sum(tensors)
    return "", local_sum(tensors)


def save_rows(rank: int, ranks: int, save_dir: Path) -> None:
    save_step(CheckpointWriter(save_dir, dist.group.WORLD), ranks, 1)


def test_damage_in_any_file_is_reported_by_all_ranks(tmp_path: Path) -> None:
    run_ranks(save_rows, 3, tmp_path)
    checkpoint = tmp_path / "iter_0000001"
    assert run_ranks(load_rows, 3, checkpoint) == [("", 1000.0)] * 3
    with open(checkpoint / "rank-00001.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.truncate(checkpoint / "rank-00002.safetensors", 100)
    for said, total in run_ranks(load_rows, 3, checkpoint):
        assert f"{checkpoint}/rank-00001.safetensors has SHA-256" in said
        assert f"{checkpoint}/rank-00002.safetensors has 100 bytes, expected" in said
        assert "rank-00000" not in said
        assert total == 0.0


def choose(rank: int, ranks: int, load_dir: Path) -> str:
    try:
        return agree_on_checkpoint(load_dir, dist.group.WORLD).name
    except CheckpointError as error:
        return str(error)


def test_all_ranks_load_what_rank_0_found(tmp_path: Path) -> None:
    said = run_ranks(choose, 2, tmp_path)
    assert said[0] == said[1]
    assert "holds no complete checkpoint" in said[0]
    save_plain(tmp_path, 7, plain())
    assert run_ranks(choose, 2, tmp_path) == ["iter_0000007"] * 2


def refuse_infinity(rank: int, ranks: int, save_dir: Path) -> str:
    tensors = rows(ranks, 1)
    weight = tensors["model.weight"]
    assert isinstance(weight, DTensor)
    if rank == 1:
        weight.to_local()[0, 5] = float("inf")
    try:
        CheckpointWriter(save_dir, dist.group.WORLD).save(1, tensors, config={}, counters={})
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_checkpoint_with_infinity_is_not_saved(tmp_path: Path) -> None:
    for said in run_ranks(refuse_infinity, 2, tmp_path):
        assert "rank 1: model.weight has NaN or infinity in it" in said
    assert os.listdir(tmp_path) == []
