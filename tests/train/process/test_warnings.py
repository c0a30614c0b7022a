"""torch does not warn: what it warns of is avoided rather than hidden."""

import warnings
from typing import Any

import pytest

from tests.gloo import launch_ranks
from tests.train.runs import Ending, pretrain

RUN = {"mock_data": True, "vocab_size": 320, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4,
       "seq_length": 32, "lr": 1e-3, "micro_batch_size": 1, "global_batch_size": 4, "train_iters": 2, "eval_iters": 1,
       "eval_interval": 1, "random_ltd": True, "random_ltd_start_length": 8, "random_ltd_steps": 8}


def strictly(rank: int, world_size: int, init_method: str, settings: dict[str, Any]) -> Ending:
    """`pretrain`, in which a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return pretrain(rank, world_size, init_method, settings)


@pytest.mark.parametrize("change", [
    {"data_parallel_sharding_strategy": "optim_grads_params"},
    {"pipeline_model_parallel_size": 2, "bf16": True},
    {"family": "bert", "bert_no_binary_head": True, "use_distributed_optimizer": True},
], ids=["zero-3", "pipeline", "bert-zero-2"])
def test_no_sharded_module_returns_a_view(change: dict[str, Any]) -> None:
    for ending in launch_ranks(strictly, 2, {**RUN, **change}, timeout=120):
        assert ending.code == 0, ending.said
