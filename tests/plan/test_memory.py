"""The memory that a run is predicted to need, by hand. `benchmarks/plan_accuracy` holds it against processes."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.memory import MemoryModel, padded_parameter_count, parameters_text
from megatron_ltd.token_drop.plan import StepPlan
from tests.plans import plan_of

H, L, S, B, V, N = 32, 3, 16, 2, 128, 4
MODEL = ModelConfig(num_layers=L, hidden_size=H, num_attention_heads=N, seq_length=S, vocab_size=V)
LAYER = 12 * H * H + 13 * H
PARAMETERS = (V + S) * H + L * LAYER + 2 * H
WHOLE = StepPlan.whole(S, L)


def of(dp: int = 1, microbatches: int = 2, model: ModelConfig = MODEL, optimizer: str = "adam", bf16: bool = False,
       **parallel: Any) -> MemoryModel:
    config = RunConfig(model=model, parallel=ParallelConfig(**parallel),
                       optimizer=OptimizerConfig(optimizer=optimizer),  # type: ignore[arg-type]
                       training=TrainingConfig(micro_batch_size=B, global_batch_size=B * microbatches * dp, bf16=bf16))
    layout = config.parallel
    world = dp * layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    return MemoryModel(config, Layout.of(config, world), "cpu")


def test_parameters_by_hand() -> None:
    assert padded_parameter_count(RunConfig(model=MODEL)) == PARAMETERS
    assert parameters_text(RunConfig(model=MODEL)) == f"{PARAMETERS:,}"
    padded = replace(MODEL, vocab_size=V - 28)
    assert parameters_text(RunConfig(model=padded)) == (f"{PARAMETERS - 28 * H:,} ({PARAMETERS:,} with rows that pad "
                                                        "the vocabulary)")


@pytest.mark.parametrize(("settings", "each"), [
    ({}, 16.0), ({"bf16": True}, 18.0), ({"dp": 4, "bf16": True}, 18.0), ({"dp": 4}, 20.0),
    ({"dp": 4, "bf16": True, "use_distributed_optimizer": True}, 6.0), ({"optimizer": "sgd"}, 12.0)])
def test_weights_gradients_and_moments_by_hand(settings: dict[str, Any], each: float) -> None:
    assert of(**settings).state(0) == int(PARAMETERS * each)


def test_a_table_of_n_grams_is_shared_by_tensor_parallel_processes_and_its_gradient_is_made_apart() -> None:
    triples, pairs = replace(MODEL, ngram_rows=10**6, ngram_length=3), replace(MODEL, ngram_rows=10**6)
    assert of(model=triples).state(0) - of().state(0) == 16 * 2 * 10**6 * H
    two = of(model=pairs, tensor_model_parallel_size=2).state(0) - of(tensor_model_parallel_size=2).state(0)
    assert two == 16 * 10**6 // 2 * H
    alone, accumulated = (of(microbatches=count, model=pairs).peak(0, WHOLE).total for count in (1, 2))
    assert accumulated - alone == pytest.approx(4 * 10**6 * H, rel=0.01)


def test_muon_keeps_one_moment_of_the_layers_matrices_and_two_of_all_else() -> None:
    matrices = L * 12 * H * H
    assert of(optimizer="muon").state(0) == 8 * PARAMETERS + 4 * matrices + 8 * (PARAMETERS - matrices)
    sharded = of(4, optimizer="muon", use_distributed_optimizer=True, tensor_model_parallel_size=2)
    matrices //= 2
    mine = V * H // 2 + S * H + 2 * H + L * ((3 + 4) * H // 2 + 6 * H) + matrices
    assert sharded.state(0) == (16 * mine - 4 * matrices) // 4 + 4 * mine


def test_zero_3_keeps_what_is_outside_the_layers_and_one_layer() -> None:
    found = of(4, bf16=True, data_parallel_sharding_strategy="optim_grads_params").state(0)
    assert found == PARAMETERS * 16 // 4 + 2 * (PARAMETERS - 2 * LAYER)


def test_tensor_parallel_processes_share_matrices_but_not_norms() -> None:
    layer = 12 * H * H // 2 + (3 + 4) * H // 2 + 6 * H  # qkv and first biases are shared; 2 biases and 4 norms whole
    assert of(tensor_model_parallel_size=2).state(0) == 16 * (V * H // 2 + S * H + L * layer + 2 * H)


def test_a_tied_embedding_is_held_by_both_ends_of_a_pipeline() -> None:
    first, last = (of(pipeline_model_parallel_size=3).state(rank) for rank in (0, 2))
    assert first == 16 * (LAYER + (V + S) * H) and last == 16 * (LAYER + V * H + 2 * H)


def test_activations_by_hand() -> None:
    tokens = B * S
    # Inputs and outputs of two norms, query, key and value, the result, twice the MLP's width; in fp32. Statistics: two
    # numbers a token and norm, one a token and head.
    layer = 4 * tokens * (4 * H + 3 * H + H + 2 * 4 * H) + 16 * tokens + 4 * tokens * N
    assert of().peak(0, WHOLE).activations == L * layer
    assert of(model=replace(MODEL, qkv_conv_kernel=4)).peak(0, WHOLE).activations == L * (layer + 4 * tokens * 3 * H)
    spared = 4 * tokens * (2 * H + 4 * H) + 16 * tokens  # outputs of norms, statistics, and the activation function
    assert of(recompute_granularity="selective").peak(0, WHOLE).activations == L * (layer - spared)
    assert of(recompute_granularity="full").peak(0, WHOLE).activations == L * 4 * tokens * H
    assert of(bf16=True).peak(0, WHOLE).activations == L * (layer - 16 * tokens - 4 * tokens * N) // 2 + L * (
        16 * tokens + 4 * tokens * N)


def test_dropped_layers_keep_what_they_process() -> None:
    kept, tokens = 4, B * 4
    dropped = 4 * tokens * 16 * H + 16 * tokens + 4 * tokens * N + 16 * tokens  # and two lists of rows
    found = of().peak(0, plan_of(S, L, kept, [1])).activations
    assert found == of().peak(0, WHOLE).activations * 2 // 3 + dropped


def test_the_layers_of_a_run_share_a_mask() -> None:
    kept, tokens = 4, B * 4
    dropped = plan_of(S, L, kept, [1])  # the others, which process all tokens, share theirs
    plain = of().peak(0, dropped).activations
    alibi = replace(MODEL, position_embedding_type="alibi")
    assert of(model=alibi).peak(0, dropped).activations == plain + 4 * N * (S * S + tokens * kept)
    assert of(model=alibi, bf16=True).peak(0, WHOLE).activations == of(bf16=True).peak(
        0, WHOLE).activations + 2 * N * S * S
    window = replace(MODEL, window_size=(5, 0))
    assert of(model=window).peak(0, dropped).activations == plain + 4 * (S * S + tokens * kept)
    assert of(model=replace(window, window_size=(S, 0))).peak(0, dropped).activations == plain


def test_a_stage_holds_the_microbatches_that_1f1b_has_in_flight_and_a_buffer_for_what_arrives() -> None:
    tokens, of_pipeline = B * S, of(pipeline_model_parallel_size=3, microbatches=8)
    layer = 4 * tokens * 16 * H + 16 * tokens + 4 * tokens * N
    stream = 4 * tokens * H
    first, middle = of_pipeline.peak(0, WHOLE), of_pipeline.peak(1, WHOLE)
    assert first.activations == 3 * (layer + stream) and middle.activations == 2 * (layer + stream)
    matrix = 4 * 4 * H * H  # the gradient of one, while it is added
    assert first.communication == stream + matrix and middle.communication == 2 * stream + matrix


def test_the_head_keeps_its_gradients_and_a_chunk_of_logits() -> None:
    large = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=64, vocab_size=2048)
    found = of(model=large).peak(0, StepPlan.whole(64, 1)).head
    tokens = B * 64
    # The final norm's input, hidden states and their gradient, the gradient of the embedding, the logits.
    assert found == 3 * 4 * tokens * 8 + 4 * 2048 * 8 + 4 * tokens * 2048
