"""BERT against a dense model in float64, and against `transformers` with the same weights."""

from typing import Any

import pytest
import torch
from transformers import MegatronBertConfig, MegatronBertForPreTraining

from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.parallel.gradients import reduce_replicated
from tests.gloo import run_ranks
from tests.model import dense_reference
from tests.model.tiny import (
    OLMO2_LIKE,
    QWEN3_LIKE,
    assert_gradients_close,
    build_model,
    documents,
    load,
    run,
    tiny_batch,
    tiny_bert_batch,
    tiny_config,
    whole_gradients,
    whole_parameters,
)
from tests.model.transformers_weights import of_megatron_bert
from tests.parallel.sharded import tensor_parallel

ROPE: dict[str, Any] = {"position_embedding_type": "rope", "group_query_attention": True, "num_query_groups": 2}
PLAIN_HEAD: dict[str, Any] = {"bert_no_binary_head": True, "untie_embeddings_and_output_weights": True}
WEIGHTS = torch.tensor([1.0, 2.5], dtype=torch.float64)
"""Of the two losses, so that a mistake in one is not made good by the other."""

KEPT = [[0, 3, 4, 9, 15, 20], [2, 5, 10, 11, 17, 23], [1, 2, 6, 7, 8, 22]]
"""Sets of three samples, of which the second has mostly padding."""


def losses_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = run(model, batch).reshape(-1)
    (losses * WEIGHTS[:len(losses)]).sum().backward()
    return losses.detach().double(), whole_gradients(model)


def check_dense(model: Any, batch: dict[str, torch.Tensor], sets: dict[int, list[list[int]]] | None = None,
                cross: int | None = None) -> None:
    weights = dense_reference.leaves(whole_parameters(model))
    expected = dense_reference.bert_losses(weights, model.config, batch, sets, cross)
    (expected * WEIGHTS[:len(expected)]).sum().backward()
    losses, gradients = losses_and_gradients(model, batch)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=0.0)
    assert_gradients_close(gradients, {name: w.grad for name, w in weights.items() if w.grad is not None})


@pytest.mark.parametrize("settings", [{}, ROPE, PLAIN_HEAD], ids=["learned", "rotary", "no binary head, untied"])
def test_the_whole_model_is_a_dense_one(tp: TensorParallel, settings: dict[str, Any]) -> None:
    config = tiny_config(family="bert", **settings)
    check_dense(build_model(config, tp), tiny_bert_batch(config))


@pytest.mark.parametrize("settings", [{}, ROPE], ids=["learned", "rotary"])
@pytest.mark.parametrize(("dropped", "cross"), [([1, 2, 3], None), ([1, 2, 3], 1), ([2, 3], 2)],
                         ids=["no cross layer", "cross layer 1", "cross layer 2"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_layers_compute_the_shared_subset_and_the_cross_layer_sees_all(
    tp: TensorParallel, settings: dict[str, Any], dropped: list[int], cross: int | None, recompute: str,
) -> None:
    config = tiny_config(family="bert", **settings)
    batch = tiny_bert_batch(config) | {"kept": torch.tensor(KEPT)}
    model = build_model(config, tp, dropped=dropped, kept=6, shared=True, cross_layer=cross, recompute=recompute)
    check_dense(model, batch, dict.fromkeys(dropped, KEPT), cross)


def test_evaluation_never_drops(tp: TensorParallel) -> None:
    config = tiny_config(family="bert", hidden_dropout=0.3, attention_dropout=0.3)
    batch = tiny_bert_batch(config)
    with torch.no_grad():
        dropping = run(build_model(config, tp, dropped=[1, 2, 3], kept=6, shared=True, cross_layer=1).eval(), batch)
        plain = run(build_model(tiny_config(family="bert"), tp).eval(), batch)
    assert torch.equal(dropping, plain)


def test_half_layers_save_nothing_of_full_length(tp: TensorParallel) -> None:
    """All but the embedding, the cross layer and the head, which see every token, in a stage of their own."""
    config = tiny_config(family="bert", seq_length=72)
    batch = tiny_bert_batch(config) | {"kept": torch.arange(8).repeat(3, 1)}
    stage = build_model(config, tp, dropped=[1, 2, 3], kept=8, shared=True, cross_layer=1, span=(2, 4))
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    stream = torch.randn(72, 3, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(stage, batch | {"tokens": stream}).sum().backward()
    assert len(saved) >= 2 * 5
    assert [shape for shape in saved if 72 in shape or 72 * 3 in shape] == []


def test_a_sample_that_keeps_nothing_but_padding_stays_a_number(tp: TensorParallel) -> None:
    config = tiny_config(family="bert")
    only_padding = [KEPT[0], [18, 19, 20, 21, 22, 23], KEPT[2]]
    batch = tiny_bert_batch(config) | {"kept": torch.tensor(only_padding)}
    model = build_model(config, tp, dropped=[1, 2, 3], kept=6, shared=True)
    check_dense(model, batch, dict.fromkeys([1, 2, 3], only_padding))


@pytest.mark.parametrize("settings", [{}, {"position_embedding_type": "rope"}, QWEN3_LIKE, OLMO2_LIKE],
                         ids=["learned", "rotary", "windows and norms of heads", "window, norms after"])
def test_the_cross_layer_of_gpt_sees_earlier_tokens_of_its_document(tp: TensorParallel,
                                                                    settings: dict[str, Any]) -> None:
    config = tiny_config(**settings)
    for facts in ({}, documents(config)):
        batch = tiny_batch(config) | facts | {"kept": torch.tensor(KEPT)}
        model = build_model(config, tp, dropped=[1, 2, 3], kept=6, shared=True, cross_layer=1)
        weights = dense_reference.leaves(whole_parameters(model))
        expected = dense_reference.loss(weights, config, batch, dict.fromkeys([1, 2, 3], KEPT), 1)
        expected.backward()
        loss = run(model, batch)
        loss.backward()
        torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=0.0)
        assert_gradients_close(whole_gradients(model),
                               {name: w.grad for name, w in weights.items() if w.grad is not None})


def on_ranks(rank: int, ranks: int, sequence_parallel: bool, settings: dict[str, Any],
             drop: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Losses and whole gradients in training, and the scores of evaluation, of one tensor-parallel rank."""
    tp = TensorParallel(tensor_parallel(ranks).mesh, sequence_parallel)
    config = tiny_config(family="bert", **settings)
    model = build_model(config, tp, **drop)
    batch = tiny_bert_batch(config) | ({"kept": torch.tensor(KEPT_IN_HALVES)} if drop else {})
    losses, gradients = losses_and_gradients(model, batch)
    if sequence_parallel:  # what the training step does: replicated parameters have the gradient of their slice
        reduce_replicated(list(model.parameters()), tp)
        gradients = whole_gradients(model)
    with torch.no_grad():
        return losses, gradients, run(model.eval(), {k: v for k, v in batch.items() if k != "kept"})


KEPT_IN_HALVES = [[0, 3, 4, 12, 15, 20], [2, 5, 10, 12, 17, 23], [1, 2, 6, 13, 18, 22]]
"""Three of each half of the sequence."""


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2-sp"])
@pytest.mark.parametrize("drop", [{}, {"dropped": [1, 2, 3], "kept": 6, "shared": True, "cross_layer": 1, "strata": 2}],
                         ids=["full", "dropping"])
@pytest.mark.parametrize("settings", [{"vocab_size": 61}, {**PLAIN_HEAD, "vocab_size": 30}],
                         ids=["binary head", "second rank without tokens"])
def test_tensor_parallel_ranks_compute_the_whole_model(sequence_parallel: bool, drop: dict[str, Any],
                                                       settings: dict[str, Any]) -> None:
    settings = {**settings, "make_vocab_size_divisible_by": 64}
    ((losses, gradients, scores),) = run_ranks(on_ranks, 1, False, settings, drop)
    found = run_ranks(on_ranks, 2, sequence_parallel, settings, drop)
    torch.testing.assert_close(found[0][0], losses, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found[0][2], scores, rtol=1e-5, atol=1e-5)
    for of_rank in found:
        assert_gradients_close(of_rank[1], gradients, 2e-5)


@pytest.mark.parametrize("types", [True, False], ids=["binary head", "without"])
def test_transformers_megatron_bert_gives_the_same_scores_losses_and_gradients(tp: TensorParallel,
                                                                               types: bool) -> None:
    config = tiny_config(family="bert", norm_epsilon=1e-3, max_position_embeddings=30, bert_no_binary_head=not types)
    theirs = MegatronBertForPreTraining(MegatronBertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=128,
        hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=30,
        type_vocab_size=2, layer_norm_eps=1e-3, pad_token_id=None))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith(("ln.weight", "LayerNorm.weight"))
            parameter.copy_(1.0 + 0.2 * noise if is_norm else 0.25 * noise)
        if not types:
            theirs.bert.embeddings.token_type_embeddings.weight.zero_()
    ours = build_model(config, tp)
    load(ours, of_megatron_bert({name: p.detach() for name, p in theirs.named_parameters()}, config))
    batch = tiny_bert_batch(config)
    answer = theirs(batch["tokens"], attention_mask=batch["padding_mask"].long(), token_type_ids=batch.get(
        "token_types", torch.zeros_like(batch["tokens"])))
    taken = answer.prediction_logits[torch.arange(3)[:, None], batch["predicted_positions"]]  # [b, p, v]
    assert float(taken.detach().std()) > 0.5, "logits near zero would agree whatever the model does"
    per_token = taken.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
    losses = [-(per_token * batch["loss_mask"]).sum()]
    if types:
        order = answer.seq_relationship_logits.log_softmax(-1).gather(1, batch["sentence_order"][:, None])
        losses.append(-order.sum())
    with torch.no_grad():
        log_probabilities, greedy = run(ours.eval(), batch)
    torch.testing.assert_close(log_probabilities[:, :5], per_token.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy[:, :5].bool(), taken.argmax(-1) == batch["labels"])
    if types:
        torch.testing.assert_close(log_probabilities[:, 5:], order.detach(), rtol=1e-5, atol=1e-5)
    found, gradients = losses_and_gradients(ours.train(), batch)
    torch.testing.assert_close(found, torch.stack(losses).detach().double(), rtol=1e-5, atol=0.0)
    (torch.stack(losses).double() * WEIGHTS[:len(losses)]).sum().backward()
    assert_gradients_close(gradients, of_megatron_bert(
        {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}, config))
