"""Initial weights of runs: those of one process in every layout, and drawn once by the processes that share them."""

from datetime import timedelta
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.model import init
from megatron_ltd.parallel.mesh import build_mesh
from megatron_ltd.train.setup import build_model
from tests.gloo import run_ranks
from tests.model.tiny import tiny_config

DRAWN = ("word.weight", "position.weight", "qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")


def built(rank: int, ranks: int, tp: int, pp: int, sharding: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Names of the weights that this process drew, and the whole weights of its stage."""
    config = RunConfig(
        model=tiny_config(num_layers=4, ngram_rows=20),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                                data_parallel_sharding_strategy=sharding),
        training=TrainingConfig(micro_batch_size=1, seed=3), optimizer=OptimizerConfig(lr=1e-2))
    mesh = build_mesh("cpu", pp=pp, dp=ranks // (tp * pp), tp=tp, shard_parameters=sharding != "no_shard",
                      timeout=timedelta(seconds=60))
    drawn: list[str] = []

    def noted(name: str, *args: object) -> torch.Tensor:
        drawn.append(name)
        return initial_value(name, *args)

    initial_value = init.initial_value
    with mock.patch.object(init, "initial_value", noted):
        model = build_model(config, mesh, torch.device("cpu"))
    whole = {p.global_name: p.parameter.full_tensor().detach() for p in model.parameters
             if isinstance(p.parameter, DTensor)}
    return drawn, whole


@pytest.mark.parametrize("ranks, tp, pp, sharding", [
    (2, 1, 1, "no_shard"), (3, 1, 1, "optim_grads_params"), (4, 2, 1, "optim_grads"), (4, 1, 2, "no_shard")])
def test_processes_that_share_weights_draw_each_once(ranks: int, tp: int, pp: int, sharding: str) -> None:
    ((_, alone),) = run_ranks(built, 1, 1, 1, "no_shard")
    found = run_ranks(built, ranks, tp, pp, sharding)
    for _, whole in found:
        assert [name for name, weight in whole.items() if not torch.equal(weight, alone[name])] == []
    data = ranks // (tp * pp)
    for stage in range(pp):
        for tp_rank in range(tp):
            sharing = [found[(stage * data + replica) * tp + tp_rank] for replica in range(data)]
            drawn = sorted(name for names, _ in sharing for name in names)
            assert drawn == sorted(name for name in sharing[0][1] if name.endswith(DRAWN))
            assert all(names for names, _ in sharing)
