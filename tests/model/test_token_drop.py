"""Token dropping in the model: each dropped layer computes what a dense layer computes on the explicit subset."""

from typing import Any

import pytest
import torch

from megatron_ltd.parallel.collectives import TensorParallel
from tests.model import dense_reference
from tests.model.tiny import (
    BLOOM_LIKE,
    CONVOLUTION,
    GPT2_LIKE,
    LLAMA_LIKE,
    NGRAMS,
    OLMO2_LIKE,
    QWEN3_LIKE,
    SEED,
    SMOLLM3_LIKE,
    assert_gradients_close,
    build_gpt,
    documents,
    loss_and_gradients,
    run,
    tiny_batch,
    tiny_config,
    whole_parameters,
)
from tests.token_drop import splitmix_reference

PARTIAL_ROTARY = {"position_embedding_type": "rope", "rotary_percent": 0.5, "rotary_base": 300, "kv_channels": 12}
NO_POSITIONS = {"position_embedding_type": "none", "add_qkv_bias": True, "disable_bias_linear": True}


def kept_sets(batch: dict[str, torch.Tensor], dropped: list[int], keep: int,
              strata: int = 1) -> dict[int, list[list[int]]]:
    """For each dropped layer the kept positions of each sample, from plain Python."""
    tokens = batch["tokens"].shape[1]
    return {layer: [splitmix_reference.kept(SEED, int(sample), layer, tokens=tokens, keep=keep, strata=strata)
                    for sample in batch["sample_ids"]] for layer in dropped}


@pytest.mark.parametrize(("settings", "dropped", "keep", "strata", "with_documents"), [
    pytest.param(GPT2_LIKE, [1, 2, 3], 6, 1, False, id="learned positions"),
    pytest.param(LLAMA_LIKE, [1, 2, 3], 6, 1, False, id="rotary positions"),
    pytest.param(LLAMA_LIKE, [1, 2, 3], 1, 1, False, id="one token"),
    pytest.param(LLAMA_LIKE, [1, 2, 3], 23, 1, False, id="all but one token"),
    pytest.param(LLAMA_LIKE, [1, 3], 8, 4, False, id="every other layer, four strata"),
    pytest.param(LLAMA_LIKE, [0, 4], 12, 2, False, id="first and last layer, two strata"),
    pytest.param(GPT2_LIKE, [0, 1, 2, 3, 4], 9, 1, False, id="every layer"),
    pytest.param(PARTIAL_ROTARY, [1, 2, 3], 10, 1, True, id="partial rotary positions, documents"),
    pytest.param(LLAMA_LIKE, [1, 2, 4], 10, 2, True, id="rotary positions, documents"),
    pytest.param(GPT2_LIKE, [1, 2, 3], 10, 1, True, id="learned positions, documents"),
    pytest.param(BLOOM_LIKE, [1, 2, 3], 6, 1, False, id="biases by distance"),
    pytest.param(BLOOM_LIKE | {"hidden_size": 48, "num_attention_heads": 6, "window_size": (6, 0)}, [1, 2, 4], 10, 2,
                 True, id="biases by distance, windows, documents"),
    pytest.param(QWEN3_LIKE | {"apply_layernorm_1p": True, "position_embedding_type": "alibi"}, [1, 3], 12, 1, False,
                 id="every norm with one plus its weight"),
    pytest.param(NO_POSITIONS, [1, 2, 3], 10, 1, False, id="no positions, only the first biases"),
    pytest.param(QWEN3_LIKE, [1, 2, 3], 12, 1, False, id="norms of queries and keys, windows in most layers"),
    pytest.param(OLMO2_LIKE, [1, 2, 4], 10, 2, True, id="norms after, and over all heads, windows, documents"),
    pytest.param(NGRAMS, [1, 2, 3], 6, 1, False, id="pairs and triples"),
    pytest.param(LLAMA_LIKE | NGRAMS | {"ngram_length": 2}, [1, 2, 4], 10, 2, True, id="pairs within documents"),
    pytest.param(BLOOM_LIKE | NGRAMS | {"ngram_length": 5}, [1, 2, 4], 10, 2, True, id="up to fives, normalised"),
    pytest.param(GPT2_LIKE | CONVOLUTION, [1, 2, 3], 12, 1, False, id="convolutions"),
    pytest.param(QWEN3_LIKE | CONVOLUTION, [1, 2, 4], 16, 2, True, id="convolutions within documents, norms, windows"),
    pytest.param(LLAMA_LIKE | {"qkv_conv_kernel": 16}, [0, 1, 3], 6, 1, True, id="wide convolutions of few tokens"),
    pytest.param(SMOLLM3_LIKE, [0, 1, 3], 12, 1, False, id="layers without rotation, scaled positions, some biases"),
])
def test_dropped_layers_compute_the_explicit_subset(
    tp: TensorParallel, settings: dict[str, Any], dropped: list[int], keep: int, strata: int, with_documents: bool,
) -> None:
    config = tiny_config(**settings)
    batch = tiny_batch(config) | (documents(config) if with_documents else {})
    model = build_gpt(config, tp, dropped=dropped, kept=keep, strata=strata)
    weights = dense_reference.leaves(whole_parameters(model))
    expected = dense_reference.loss(weights, config, batch, kept_sets(batch, dropped, keep, strata))
    expected.backward()
    loss, gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0.0)
    assert_gradients_close(gradients, {name: w.grad for name, w in weights.items() if w.grad is not None})


def test_positions_and_choice_of_the_kept_tokens_show_in_the_loss(tp: TensorParallel) -> None:
    """Rotating kept tokens by 0..k-1 as if they were neighbours, or keeping others, would not pass the test above."""
    config = tiny_config(**LLAMA_LIKE)
    batch = tiny_batch(config)
    weights = {name: weight.double() for name, weight in whole_parameters(build_gpt(config, tp)).items()}
    sets = kept_sets(batch, [1, 2, 3], 6)
    expected = float(dense_reference.loss(weights, config, batch, sets))
    neighbours = {layer: [list(range(6))] * 3 for layer in sets}
    other_layers = {layer: sets[layer % 3 + 1] for layer in sets}
    for wrong in (neighbours, other_layers, {}):
        assert abs(float(dense_reference.loss(weights, config, batch, wrong)) - expected) > 1e-3 * expected


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE], ids=["learned", "rotary"])
@pytest.mark.parametrize("kept", [24, 25, 1000])
def test_keeping_the_whole_sequence_is_bit_for_bit_no_dropping(tp: TensorParallel, settings: dict[str, Any],
                                                               kept: int) -> None:
    config = tiny_config(**settings, hidden_dropout=0.1)
    batch = tiny_batch(config)
    loss, gradients = loss_and_gradients(build_gpt(config, tp, dropped=[1, 2, 3], kept=kept), batch)
    plain_loss, plain_gradients = loss_and_gradients(build_gpt(config, tp), batch)
    assert torch.equal(loss, plain_loss)
    assert [name for name in gradients if not torch.equal(gradients[name], plain_gradients[name])] == []


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE], ids=["learned", "rotary"])
def test_evaluation_never_drops(tp: TensorParallel, settings: dict[str, Any]) -> None:
    config = tiny_config(**settings, hidden_dropout=0.3, attention_dropout=0.3)
    batch = tiny_batch(config)
    with torch.no_grad():
        dropping = run(build_gpt(config, tp, dropped=[0, 1, 2, 3, 4], kept=1).eval(), batch)
        plain = run(build_gpt(tiny_config(**settings), tp).eval(), batch)
    assert torch.equal(dropping, plain)


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE, BLOOM_LIKE], ids=["learned", "rotary", "alibi"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_is_bit_for_bit_what_was_kept(tp: TensorParallel, settings: dict[str, Any],
                                                    recompute: str) -> None:
    config = tiny_config(**settings, hidden_dropout=0.2, attention_dropout=0.2)
    batch = tiny_batch(config)
    expected_loss, expected = loss_and_gradients(build_gpt(config, tp, dropped=[1, 2, 3], kept=8), batch)
    loss, gradients = loss_and_gradients(build_gpt(config, tp, dropped=[1, 2, 3], kept=8, recompute=recompute), batch)
    assert torch.equal(loss, expected_loss)
    assert [name for name in gradients if not torch.equal(gradients[name], expected[name])] == []


def test_in_half_precision_all_layers_keep_the_same_biases_of_alibi(tp: TensorParallel) -> None:
    config = tiny_config(**BLOOM_LIKE)
    model, kept = build_gpt(config, tp).to(torch.bfloat16), set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (config.seq_length, config.seq_length):
            kept.add((tensor.dtype, tensor.data_ptr()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_and_gradients(model, tiny_batch(config))
    assert len(kept) == 1


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_dropped_layers_save_nothing_of_full_length(tp: TensorParallel, recompute: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stack drops, between an embedding and a head that are not counted."""
    config = tiny_config(**LLAMA_LIKE, seq_length=72)
    batch = tiny_batch(config, samples=2)
    model = build_gpt(config, tp, dropped=[0, 1, 2, 3, 4], kept=8, recompute=recompute)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    stack_forward = model.stack.forward

    def watched(*args: Any) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return stack_forward(*args)

    monkeypatch.setattr(model.stack, "forward", watched)
    run(model, batch)
    assert len(saved) >= 5 * 3
    assert [shape for shape in saved if 72 in shape or 72 * 2 in shape] == []


def test_a_stage_overwrites_neither_its_input_nor_the_gradient_that_comes_in(tp: TensorParallel) -> None:
    """Both belong to the pipeline engine."""
    config = tiny_config(**LLAMA_LIKE)
    batch = tiny_batch(config)
    stage = build_gpt(config, tp, dropped=[1, 2], kept=6, span=(1, 3))
    x = torch.randn(24, 3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = x.detach().clone()
    y = run(stage, batch | {"tokens": x})
    incoming = torch.ones_like(y)
    y.backward(incoming)
    assert torch.equal(x, before)
    assert torch.equal(incoming, torch.ones_like(y))


def test_a_batch_may_be_cut_anywhere(tp: TensorParallel) -> None:
    """Kept positions and dropout belong to the sample, not to the microbatch it is in."""
    config = tiny_config(**LLAMA_LIKE, hidden_dropout=0.1, attention_dropout=0.1)
    batch = tiny_batch(config, samples=4) | documents(config, samples=4)
    model = build_gpt(config, tp, dropped=[1, 2, 3], kept=6)
    whole, whole_gradients = loss_and_gradients(model, batch)
    total = torch.zeros(())
    sums = {name: torch.zeros_like(gradient) for name, gradient in whole_gradients.items()}
    for rows in ([3], [0, 2], [1]):
        loss, gradients = loss_and_gradients(model, {name: value[rows] for name, value in batch.items()})
        total += loss
        sums = {name: sums[name] + gradients[name] for name in sums}
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0.0)
    assert_gradients_close(sums, whole_gradients)


def test_every_token_enters_the_loss_and_reaches_the_embedding(tp: TensorParallel) -> None:
    """Tokens that every dropped layer leaves out still learn, and still have a loss."""
    config = tiny_config(position_embedding_type="learned_absolute")
    batch = tiny_batch(config, samples=1) | {"loss_mask": torch.ones(1, 24)}
    model = build_gpt(config, tp, dropped=[1, 2, 3], kept=2)
    _, gradients = loss_and_gradients(model, batch)
    assert bool((gradients["embedding.position.weight"].abs().sum(1) > 0).all())
