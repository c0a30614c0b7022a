"""ViT between Hugging Face folders and our checkpoints: the same logits there and back, and what is refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import ViTConfig, ViTForImageClassification

from megatron_ltd.checkpoint.convert.huggingface.config import model_config
from megatron_ltd.checkpoint.convert.huggingface.describe import computes_the_same, describe
from megatron_ltd.checkpoint.convert.huggingface.importing import import_model
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.model.init import global_name, materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.model.vit import ViT
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.train.state import TrainState
from tests.model.test_vit import fill
from tests.train.runs import saved_tensors
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def tp() -> Iterator[TensorParallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TensorParallel(init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    dist.destroy_process_group()


def write_theirs(folder: Path, **settings: Any) -> ViTForImageClassification:
    torch.manual_seed(4)
    model = ViTForImageClassification(ViTConfig(**{
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12,
        "patch_size": 4, "num_channels": 3, "num_labels": 6, "initializer_range": 0.3, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def ours(folder: Path, tp: TensorParallel) -> ViT:
    config = RunConfig.from_dict(read_manifest(folder / "iter_0000000").config).model
    model = ViT(config, tp, StageSpan(0, config.num_layers, config.num_layers))
    materialize(model, config, prefix="", seed=1, device=torch.device("cpu"), draw=False)
    weights = {name.removeprefix("model."): value for name, value in saved_tensors(folder, 0).items()}
    assert set(weights) == {global_name(name, config) for name, _ in model.named_parameters()}
    fill(model, weights)
    return model.eval()


def test_an_imported_model_gives_the_logits_of_transformers_and_goes_back_as_it_came(
    tp: TensorParallel, tmp_path: Path,
) -> None:
    theirs = write_theirs(tmp_path / "hf")
    assert convert_checkpoint.main(["--from-hf", str(tmp_path / "hf"), "--save", str(tmp_path / "ours")]) == 0
    images = torch.randn(3, 3, 12, 12)
    logits = ours(tmp_path / "ours", tp).logits(images, torch.arange(3))
    torch.testing.assert_close(logits, theirs(images).logits, rtol=1e-5, atol=1e-5)
    assert convert_checkpoint.main(["--load", str(tmp_path / "ours"), "--to-hf", str(tmp_path / "back")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    back, report = ViTForImageClassification.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    torch.testing.assert_close(back.eval()(images).logits, theirs(images).logits)


def test_settings_of_our_own_are_described_as_transformers_reads_them(tmp_path: Path) -> None:
    write_theirs(tmp_path / "hf", initializer_range=0.02)
    original = json.loads((tmp_path / "hf" / "config.json").read_text())
    config = model_config(original, tmp_path)
    described = describe(config)
    assert computes_the_same(model_config(described, tmp_path), config)
    assert {name: original[name] for name in described if name in original} == \
        {name: value for name, value in described.items() if name in original}
    with pytest.raises(CheckpointError, match="--img-h and --img-w must be equal"):
        describe(replace(config, img_w=24))


@pytest.mark.parametrize(("settings", "fragment"), [
    ({"qkv_bias": False}, "qkv_bias"), ({"hidden_act": "relu"}, "hidden_act"),
    ({"image_size": 14}, "image_size = 14: must be divisible by patch_size = 4")])
def test_what_is_not_computed_is_refused(tmp_path: Path, settings: dict[str, Any], fragment: str) -> None:
    write_theirs(tmp_path / "hf", **settings)
    with pytest.raises(CheckpointError, match=fragment):
        import_model(tmp_path / "hf", tmp_path / "ours", TrainState().counters())
