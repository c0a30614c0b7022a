"""Whatever drops in training, evaluation does not: validation, and the model as `transformers` opens it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron_ltd.checkpoint.layout import find_checkpoint
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.whole_tensors import PREFIX
from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.init import materialize
from megatron_ltd.model.transformer import StageSpan
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.token_drop.registry import POLICIES
from tests.checkpoint.convert.test_hugging_face import check_gpt, opened
from tests.checkpoint.hugging_face import write_out
from tests.model.tiny import load
from tests.policy_settings import ENABLED
from tests.train.runs import TINY, Corpus, run, saved_tensors

STEPS = 3
PLAIN: dict[str, Any] = {**{name: value for name, value in TINY.items() if not name.startswith("random_ltd")},
                         "train_iters": STEPS, "eval_interval": STEPS, "lr": 2e-2, "init_method_std": 0.2}


@pytest.fixture(scope="module")
def tp() -> Iterator[TensorParallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TensorParallel(init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    dist.destroy_process_group()


def loaded(save_dir: Path, tp: TensorParallel) -> GPT:
    config = RunConfig.from_dict(read_manifest(find_checkpoint(save_dir)).config).model
    model = GPT(config, tp, StageSpan(0, config.num_layers, config.num_layers))
    materialize(model, config, prefix="", seed=1, device=torch.device("cpu"), draw=False)
    load(model, {name.removeprefix(PREFIX): tensor for name, tensor in saved_tensors(save_dir, STEPS).items()
                 if name.startswith(PREFIX)})
    return model.eval()


@pytest.mark.parametrize("policy", [policy.name for policy in POLICIES])
def test_what_a_policy_trained_is_evaluated_whole_here_and_in_transformers(
    policy: str, corpus: Corpus, tp: TensorParallel, tmp_path: Path,
) -> None:
    settings, saved = {**PLAIN, **corpus.settings}, tmp_path / "saved"
    trained = run(tmp_path, {**settings, **ENABLED[policy], "save": str(saved)})
    assert policy == "sequence-curriculum" or trained.column("cumulative_saving")[-1] > 0.0
    # The same weights, without the policy: loaded, and trained at a rate that changes nothing.
    (tmp_path / "plain").mkdir()
    plain = run(tmp_path / "plain", {**settings, "load": str(saved), "finetune": True, "lr": 1e-30,
                                     "weight_decay": 0.0})
    assert plain.column("cumulative_saving")[-1] == 0.0
    assert trained.column("validation_loss") == pytest.approx(plain.column("validation_loss"), rel=1e-6)
    assert write_out(saved, tmp_path / "hf") == 0
    tokens = torch.randint(0, 320, (3, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        check_gpt(loaded(saved, tp), opened(tmp_path / "hf"), tokens)
