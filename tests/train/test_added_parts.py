"""A model that was trained without a table of n-grams or convolutions is given them, on several layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.saved_settings import saved_config
from megatron_ltd.errors import CheckpointError
from megatron_ltd.train.state import check_model_settings
from tests.train.runs import TINY, Corpus, run, saved_tensors

TABLE = "model.embedding.ngram.weight"
CONVOLUTIONS = [f"model.layers.{layer}.attention.conv.weight" for layer in range(TINY["num_layers"])]
PARTS = {"ngram_rows": 64, "ngram_length": 3, "qkv_conv_kernel": 4}
LAYOUTS: list[dict[str, Any]] = [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]


@pytest.fixture(scope="module")
def base(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    run(folder, {**TINY, **corpus.settings, "train_iters": 3, "save": str(folder / "checkpoints")})
    return folder / "checkpoints"


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one process", "tp2", "pp2"])
def test_parts_are_added_as_zeros_and_then_learn(base: Path, corpus: Corpus, tmp_path: Path,
                                                 layout: dict[str, Any]) -> None:
    settings = {**TINY, **corpus.settings, **layout, "load": str(base), "finetune": True, "train_iters": 3}
    world_size = 1 if not layout else 2
    plain = run(tmp_path, {**settings, "save": str(tmp_path / "plain")}, world_size)
    more = run(tmp_path, {**settings, "save": str(tmp_path / "more"), **PARTS}, world_size)
    assert more.column("lm_loss")[0] == pytest.approx(plain.column("lm_loss")[0], rel=1e-6)
    found, before = saved_tensors(tmp_path / "more", 3), saved_tensors(tmp_path / "plain", 3)
    assert found[TABLE].shape == (128, 32)
    for name in (TABLE, *CONVOLUTIONS):
        assert float(found[name].abs().max()) > 0.0 and name not in before
    goes_on = {**settings, "load": str(tmp_path / "more"), "save": str(tmp_path / "more"), "finetune": False,
               "train_iters": 4, **PARTS}
    assert 4 in run(tmp_path, goes_on, world_size).column("step")


def test_without_the_flag_the_refusal_leads_to_it(base: Path) -> None:
    path = base / "iter_0000003"
    manifest = read_manifest(path)
    config = saved_config(manifest, path)
    with_table = replace(config, model=replace(config.model, ngram_rows=64))
    with pytest.raises(CheckpointError, match="has no table of n-grams, .* --ngram-rows = 64.*with --finetune"):
        check_model_settings(with_table, manifest, path)
    with_both = replace(config, model=replace(with_table.model, qkv_conv_kernel=4))
    with pytest.raises(CheckpointError, match="no convolutions, .* --ngram-rows = 64, --qkv-conv-kernel = 4"):
        check_model_settings(with_both, manifest, path)
    other = replace(with_table, model=replace(with_table.model, num_layers=2))
    with pytest.raises(CheckpointError, match="--num-layers"):
        check_model_settings(other, manifest, path)
