"""The model on two and four ranks computes what it computes on one."""

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.gradients import reduce_replicated
from tests.gloo import run_ranks
from tests.model.tiny import (
    BLOOM_LIKE,
    CONVOLUTION,
    GPT2_LIKE,
    LLAMA_LIKE,
    NGRAMS,
    OLMO2_LIKE,
    QWEN3_LIKE,
    assert_gradients_close,
    build_gpt,
    documents,
    loss_and_gradients,
    run,
    tiny_batch,
    tiny_config,
    whole_gradients,
)

Result = tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]
LAYER_NORM = {"normalization": "LayerNorm"}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
HALF_THE_RANKS_HOLD_PADDING = {"make_vocab_size_divisible_by": 128}


def on_ranks(rank: int, world_size: int, config: ModelConfig, strata: int, sequence_parallel: bool,
             recompute: str) -> Result:
    """Loss, whole gradients and evaluation on this rank."""
    tp = TensorParallel(init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), sequence_parallel)
    batch = tiny_batch(config) | documents(config)
    model = build_gpt(config, tp, dropped=[1, 2, 3], kept=8, strata=strata, recompute=recompute)
    loss = run(model, batch)
    loss.backward()
    reduce_replicated(model.parameters(), tp)
    gradients = whole_gradients(model)
    with torch.no_grad():
        return loss.detach(), gradients, run(model.eval(), batch)


@pytest.mark.parametrize(("ranks", "sequence_parallel", "settings", "recompute"), [
    pytest.param(2, False, GPT2_LIKE | DROPOUT, "none", id="tp2-gpt2"),
    pytest.param(2, True, GPT2_LIKE | DROPOUT, "full", id="tp2-sp-gpt2-recompute"),
    pytest.param(2, True, LLAMA_LIKE | DROPOUT, "selective", id="tp2-sp-llama-selective"),
    pytest.param(4, True, LLAMA_LIKE | {"num_query_groups": 4}, "none", id="tp4-sp-llama"),
    pytest.param(4, False, LLAMA_LIKE | DROPOUT | {"add_qkv_bias": True}, "selective", id="tp4-two-groups"),
    pytest.param(2, True, QWEN3_LIKE | {"num_query_groups": 1}, "full", id="tp2-sp-one-group-qwen3-recompute"),
    pytest.param(4, True, OLMO2_LIKE, "none", id="tp4-sp-two-groups-olmo2"),
    pytest.param(4, False, OLMO2_LIKE | {"num_query_groups": 1}, "none", id="tp4-one-group-olmo2"),
    pytest.param(2, True, BLOOM_LIKE | DROPOUT, "selective", id="tp2-sp-bloom-selective"),
    pytest.param(2, False, QWEN3_LIKE, "none", id="tp2-qwen3"),
    pytest.param(4, True, LLAMA_LIKE | NGRAMS, "none", id="tp4-sp-pairs-and-triples"),
    pytest.param(4, True, LLAMA_LIKE | CONVOLUTION, "selective", id="tp4-sp-two-groups-convolution-selective"),
    pytest.param(2, False, GPT2_LIKE | CONVOLUTION, "full", id="tp2-convolution-recompute"),
    pytest.param(2, True, QWEN3_LIKE | LAYER_NORM, "selective", id="tp2-sp-norms-with-biases-selective"),
    pytest.param(2, False, OLMO2_LIKE, "full", id="tp2-olmo2-recompute"),
    pytest.param(2, True, OLMO2_LIKE | DROPOUT, "none", id="tp2-sp-olmo2"),
    pytest.param(4, False, GPT2_LIKE | HALF_THE_RANKS_HOLD_PADDING, "none", id="tp4-gpt2-padding"),
])
def test_every_rank_has_the_loss_and_the_gradients_of_one_process(
    tp: TensorParallel, ranks: int, sequence_parallel: bool, settings: dict[str, Any], recompute: str,
) -> None:
    config, strata = tiny_config(**settings), 4
    batch = tiny_batch(config) | documents(config)
    expected_loss, expected = loss_and_gradients(build_gpt(config, tp, dropped=[1, 2, 3], kept=8, strata=strata),
                                                 batch)
    with torch.no_grad():
        expected_scores = run(build_gpt(config, tp).eval(), batch)
    results: list[Result] = run_ranks(on_ranks, ranks, config, strata, sequence_parallel, recompute)
    for loss, gradients, scores in results:
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
        assert_gradients_close(gradients, expected)
        torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)
