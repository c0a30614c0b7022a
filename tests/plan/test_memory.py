"""The memory that a run is predicted to need, by hand."""

from typing import Any

import pytest

from megatron_ltd.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_ltd.plan.memory import parameter_count, predicted_bytes

MODEL = ModelConfig(num_layers=3, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=128)
LAYER = 12 * 32 * 32 + 13 * 32
PARAMETERS = (128 + 16) * 32 + 3 * LAYER + 2 * 32


def of(parallel: ParallelConfig | None = None, dp: int = 1, **training: Any) -> tuple[int, int]:
    settings = TrainingConfig(micro_batch_size=2, global_batch_size=8 * dp, **training)
    return predicted_bytes(RunConfig(model=MODEL, parallel=parallel or ParallelConfig(), training=settings), dp)


def test_parameters_by_hand() -> None:
    assert parameter_count(RunConfig(model=MODEL)) == PARAMETERS


@pytest.mark.parametrize(("parallel", "dp", "bf16", "bytes_each"), [
    ({}, 1, False, 16.0), ({}, 1, True, 18.0), ({}, 4, True, 18.0), ({"use_distributed_optimizer": True}, 4, True, 6.0),
    ({"data_parallel_sharding_strategy": "optim_grads_params"}, 4, True, 4.0),
    ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, False, 4.0),
])
def test_weights_gradients_and_moments_by_hand(
    parallel: dict[str, Any], dp: int, bf16: bool, bytes_each: float,
) -> None:
    state, _ = of(ParallelConfig(**parallel), dp, bf16=bf16)
    assert state == int(PARAMETERS * bytes_each)


def test_activations_follow_the_microbatch_and_recomputation() -> None:
    _, all_kept = of(bf16=True)
    _, recomputed = of(ParallelConfig(recompute_granularity="full"), bf16=True)
    assert all_kept == 34 * 2 * 16 * 32 * 3 and recomputed == 2 * 2 * 16 * 32 * 3
