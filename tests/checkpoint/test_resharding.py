"""A checkpoint has no layout: what one mesh saved, any other loads bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_ltd.checkpoint.io import load
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.errors import CheckpointError
from tests.checkpoint.layouts import CONFIG, COUNTERS, PARAMETERS, differing, plain, save_plain, sharded
from tests.gloo import run_ranks

LAYOUTS: dict[int, list[tuple[int, ...]]] = {
    1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(3, 1), (1, 3)], 4: [(2, 2), (4, 1), (1, 4), (2, 1, 2), (2, 2, 1)]}
"""ranks -> (dp, tp) or (replicas, dp, tp)"""


def save_layout(rank: int, ranks: int, save_dir: Path, layout: tuple[int, ...], fsdp: bool = True) -> None:
    writer = CheckpointWriter(save_dir, dist.group.WORLD)
    writer.save(20, sharded(layout, fsdp=fsdp), config=CONFIG, counters=COUNTERS)
    writer.close()


def load_layouts(rank: int, ranks: int, checkpoint: Path) -> dict[Any, list[str]]:
    wrong = {}
    for layout in LAYOUTS[ranks]:
        for fsdp in (True, False):
            tensors = sharded(layout, fsdp=fsdp, fill=False)
            load(checkpoint, tensors, dist.group.WORLD)
            wrong[layout, fsdp] = differing(tensors)
    return wrong


@pytest.mark.parametrize("layout", [(2, 2), (1, 3), (3, 1), (2, 1, 2)], ids=str)
def test_every_layout_loads_what_another_saved_bit_for_bit(tmp_path: Path, layout: tuple[int, ...]) -> None:
    run_ranks(save_layout, int(torch.tensor(layout).prod()), tmp_path, layout)
    checkpoint = tmp_path / "iter_0000020"
    for ranks in LAYOUTS:
        for wrong in run_ranks(load_layouts, ranks, checkpoint):
            assert wrong == {(layout, fsdp): [] for layout in LAYOUTS[ranks] for fsdp in (True, False)}
    tensors = plain(fill=False)
    manifest = load(checkpoint, tensors, None)
    assert differing(tensors) == []
    assert (manifest.step, manifest.config, manifest.counters) == (20, CONFIG, COUNTERS)


def test_one_process_saves_what_four_ranks_load(tmp_path: Path) -> None:
    checkpoint = save_plain(tmp_path, 20)
    for wrong in run_ranks(load_layouts, 4, checkpoint):
        assert not any(wrong.values())


@pytest.mark.parametrize(("layout", "fsdp"), [((2, 1, 2), True), ((2, 2), False)])
def test_each_number_is_saved_once(tmp_path: Path, layout: tuple[int, ...], fsdp: bool) -> None:
    run_ranks(save_layout, 4, tmp_path, layout, fsdp)
    manifest = read_manifest(tmp_path / "iter_0000020")
    stored = {name: 0 for name in manifest.tensors}
    for file in manifest.files:
        with safe_open(tmp_path / "iter_0000020" / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no dictionary)
                stored[name] += opened.get_tensor(name).numel()
    tensors = plain(fill=False)
    load(tmp_path / "iter_0000020", tensors, None)
    assert differing(tensors) == []
    assert stored == {f"model.{name}": torch.Size(shape).numel() for name, (shape, _, _) in PARAMETERS.items()}


def test_torchs_own_safetensors_reader_understands_the_files(tmp_path: Path) -> None:
    run_ranks(save_layout, 4, tmp_path, (2, 2))
    tensors = plain(fill=False)
    dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(tmp_path / "iter_0000020")), no_dist=True)
    assert differing(tensors) == []


def save_stages(rank: int, ranks: int, save_dir: Path, background: bool) -> None:
    """Two pipeline stages of two tensor-parallel ranks; the last stage's copy of the embedding is left out."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    full = torch.arange(24.0).reshape(6, 4)
    word = distribute_tensor(full, mesh["tp"], [Shard(0)], src_data_rank=None)
    stage = mesh.get_local_rank("pp")
    layer = distribute_tensor(full + 100 * (stage + 1), mesh["tp"], [Shard(1)], src_data_rank=None)
    tensors = {f"model.layers.{stage}.weight": layer, f"optimizer.exp_avg.layers.{stage}.weight": layer * 2}
    if stage == 0:
        tensors["model.embedding.weight"] = word
    writer = CheckpointWriter(save_dir, dist.group.WORLD, background=background)
    writer.save(3, tensors, config=CONFIG, counters=COUNTERS)
    for tensor in tensors.values():
        tensor.zero_()  # what is saved is what was there when `save` was called
    writer.close()


def load_on_one_stage(rank: int, ranks: int, checkpoint: Path) -> list[bool]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    full = torch.arange(24.0).reshape(6, 4)
    tensors = {name: distribute_tensor(torch.zeros(6, 4), mesh, [Shard(0)], src_data_rank=None) for name in (
        "model.embedding.weight", "model.layers.0.weight", "model.layers.1.weight",
        "optimizer.exp_avg.layers.1.weight")}
    load(checkpoint, tensors, dist.group.WORLD)
    wanted = [full, full + 100, full + 200, 2 * (full + 200)]
    return [torch.equal(t.full_tensor(), w) for t, w in zip(tensors.values(), wanted, strict=True)]


def load_on_stages(rank: int, ranks: int, checkpoint: Path) -> bool:
    full = torch.arange(24.0).reshape(6, 4)
    name = ("model.embedding.weight", "model.layers.0.weight", "model.layers.1.weight", "model.embedding.weight")[rank]
    tensors = {name: torch.zeros(6, 4)}
    load(checkpoint, tensors, dist.group.WORLD)
    return torch.equal(tensors[name], full + {1: 100, 2: 200}.get(rank, 0))


@pytest.mark.parametrize("background", [False, True])
def test_stages_with_a_tied_embedding_load_on_other_pipelines(tmp_path: Path, background: bool) -> None:
    run_ranks(save_stages, 4, tmp_path, background)
    checkpoint = tmp_path / "iter_0000003"
    assert run_ranks(load_on_one_stage, 2, checkpoint) == [[True] * 4] * 2
    assert run_ranks(load_on_stages, 4, checkpoint) == [True] * 4


def test_views_scalars_shared_and_transposed_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": base.t(), "row": base[1], "same": base, "again": base, "scalar": torch.tensor(3.5),
               "empty": torch.zeros(0, 4), "flags": torch.tensor([True, False]), "ids": torch.tensor([1 << 40, -1])}
    checkpoint = save_plain(tmp_path, 1, tensors)
    loaded = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    load(checkpoint, loaded, None)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_checkpoint_that_does_not_fit_is_refused_with_all_reasons_before_anything_is_overwritten(
    tmp_path: Path,
) -> None:
    checkpoint = save_plain(tmp_path, 20)
    tensors = plain(fill=False)
    tensors["model.qkv"] = torch.zeros(6, 8)
    tensors["model.norm"] = torch.zeros(5, dtype=torch.bfloat16)
    tensors |= {f"model.layers.{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint, tensors, None)
    message = str(caught.value)
    assert "model.layers.0 is not in the checkpoint" in message
    assert message.endswith("... and 12 more")
    assert all(not tensor.any() for tensor in tensors.values())
    with pytest.raises(CheckpointError, match=r"model.norm has dtype F32 in the checkpoint, torch.bfloat16 in the"):
        load(checkpoint, {**plain(), "model.norm": tensors["model.norm"]}, None)
    with pytest.raises(CheckpointError, match=r"model.qkv has shape \(8, 6\) in the checkpoint, \(6, 8\) in the"):
        load(checkpoint, {**plain(), "model.qkv": tensors["model.qkv"]}, None)


def test_saved_weights_that_no_rank_asks_for_are_an_error(tmp_path: Path) -> None:
    checkpoint = save_plain(tmp_path, 20, plain() | {"optimizer.exp_avg.qkv": torch.zeros(3)})
    load(checkpoint, plain(), None)  # without optimizer state
    tensors = plain()
    del tensors["model.norm"]
    with pytest.raises(CheckpointError, match="model.norm is in the checkpoint, but not in the model"):
        load(checkpoint, tensors, None)
    load(checkpoint, tensors, None, all_of=())
