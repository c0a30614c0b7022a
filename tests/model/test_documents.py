"""Samples that hold several documents: masks between them and positions from the start of each."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ltd.model.attention import context
from megatron_ltd.model.attention import documents as document_attention
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model import dense_reference
from tests.model.tiny import (
    GPT2_LIKE,
    LLAMA_LIKE,
    assert_gradients_close,
    build_gpt,
    build_model,
    documents,
    loss_and_gradients,
    run,
    tiny_batch,
    tiny_bert_batch,
    tiny_config,
    whole_gradients,
    whole_parameters,
)

BOTH_KINDS = pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE], ids=["learned", "rotary"])


@BOTH_KINDS
@pytest.mark.parametrize("facts", [(), ("document_ids",), ("position_ids",), ("document_ids", "position_ids")],
                         ids=["nothing", "documents", "positions", "both"])
def test_masks_and_positions_are_those_of_a_dense_model(tp: TensorParallel, settings: dict[str, Any],
                                                        facts: tuple[str, ...]) -> None:
    config = tiny_config(**settings)
    batch = tiny_batch(config) | {name: documents(config)[name] for name in facts}
    model = build_gpt(config, tp)
    weights = dense_reference.leaves(whole_parameters(model))
    expected = dense_reference.loss(weights, config, batch)
    expected.backward()
    loss, gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0.0)
    assert_gradients_close(gradients, {name: w.grad for name, w in weights.items() if w.grad is not None})


@BOTH_KINDS
def test_packed_documents_score_as_if_each_were_a_sample(tp: TensorParallel, settings: dict[str, Any]) -> None:
    config = tiny_config(**settings)
    batch = tiny_batch(config) | documents(config)
    model = build_gpt(config, tp).eval()
    with torch.no_grad():
        packed = run(model, batch)[0]
        for b, ids in enumerate(batch["document_ids"]):
            for document in ids.unique():
                inside = ids == document
                alone = {name: batch[name][b:b + 1, inside] for name in ("tokens", "labels", "loss_mask")}
                scores = run(model, alone | {"sample_ids": torch.zeros(1, dtype=torch.int64)})[0, 0]
                torch.testing.assert_close(packed[b, inside], scores, rtol=1e-5, atol=1e-5)


@BOTH_KINDS
def test_no_token_sees_a_later_one_or_another_document(tp: TensorParallel, settings: dict[str, Any]) -> None:
    """Derivatives of one token's loss by the embedded tokens, in every dropped and full layer."""
    config = tiny_config(**settings)
    batch = tiny_batch(config, samples=1) | documents(config, samples=1)
    model = build_gpt(config, tp, dropped=[1, 3], kept=16)
    ids = batch["document_ids"][0]
    embedded: list[torch.Tensor] = []

    def keep_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    assert model.embedding is not None
    model.embedding.register_forward_hook(keep_gradient)
    seen = 0
    for token in (0, 4, 5, 10, 17, 23):
        one = torch.zeros(1, config.seq_length)
        one[0, token] = 1.0
        run(model, batch | {"loss_mask": one}).backward()
        gradient = embedded.pop().grad
        assert gradient is not None
        reached = set(gradient[:, 0].abs().sum(1).nonzero()[:, 0].tolist())
        allowed = {place for place in range(token + 1) if ids[place] == ids[token]}
        assert token in reached and reached <= allowed
        seen += len(reached)
    assert seen > 20, "tokens must see more than themselves for this to test anything"


def test_documents_and_positions_are_gathered_with_the_kept_tokens(tp: TensorParallel) -> None:
    """Two documents whose border falls among dropped tokens: ids 0 and 1 are told apart by the facts of the kept."""
    config = tiny_config(**LLAMA_LIKE)
    batch = tiny_batch(config, samples=1)
    ids = torch.tensor([[0] * 11 + [1] * 13])
    model = build_gpt(config, tp, dropped=[0, 1, 2, 3, 4], kept=12)
    apart, _ = loss_and_gradients(model, batch | {"document_ids": ids})
    together, _ = loss_and_gradients(model, batch | {"document_ids": torch.zeros_like(ids)})
    plain, _ = loss_and_gradients(model, batch)
    torch.testing.assert_close(together, plain, rtol=1e-6, atol=0.0)
    assert abs(float(apart - plain)) > 1e-3 * float(plain)


def test_layers_that_process_the_same_tokens_keep_one_mask(tp: TensorParallel) -> None:
    """All five layers on all tokens, and three layers on a set that they share."""
    config = tiny_config(**LLAMA_LIKE)
    batch = tiny_batch(config) | {"document_ids": documents(config)["document_ids"]}
    samples, length = batch["tokens"].shape
    for settings, shapes in (({}, [(length, length)]), ({"dropped": [1, 2, 3], "kept": 8, "shared": True},
                                                       [(8, 8), (length, length)])):
        kept: dict[int, torch.Tensor] = {}
        model = build_gpt(config, tp, **settings)

        def pack(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            if tensor.shape[:2] == (samples, 1):  # of every head
                kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = run(model, batch | ({"kept": torch.arange(8).repeat(samples, 1)} if settings else {}))
        assert sorted(tuple(mask.shape[2:]) for mask in kept.values()) == shapes
        assert total.requires_grad


def stand_in(calls: list[int], *, causal: bool) -> Callable[..., torch.Tensor]:
    """In place of torch's kernel, which runs on GPUs alone: each sequence by itself. Notes the numbers of tokens."""
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
               of_keys: torch.Tensor, longest: int, longest_keys: int, window_size: tuple[int, int]) -> torch.Tensor:
        assert starts is of_keys and starts.dtype is torch.int32 and window_size == (-1, 0 if causal else -1)
        assert query.is_contiguous() and key.shape == value.shape == query.shape and starts[-1] == len(query)
        calls.append(len(query))
        found = []
        for first, end in pairwise(starts.tolist()):
            assert 0 <= end - first <= longest == longest_keys
            some = [x[first:end].transpose(0, 1) for x in (query, key, value)]
            found.append(F.scaled_dot_product_attention(*some, is_causal=causal).transpose(0, 1))
        return torch.cat(found)
    return attend


@BOTH_KINDS
def test_a_kernel_for_documents_computes_what_a_mask_does(
        tp: TensorParallel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In layers that keep all tokens and in those that drop some, in training and in evaluation."""
    config = tiny_config(**settings)
    batch = tiny_batch(config) | documents(config)
    masked = loss_and_gradients(build_gpt(config, tp, dropped=[1, 2, 3], kept=8), batch)
    with torch.no_grad():
        scores = run(build_gpt(config, tp).eval(), batch)
    calls: list[int] = []
    monkeypatch.setattr(context, "has_kernel", lambda *_: True)
    monkeypatch.setattr(document_attention, "varlen_attn", stand_in(calls, causal=True))
    bound = document_attention.most_documents(batch["document_ids"])
    batch["most_documents"] = bound  # type: ignore[assignment]
    packed = loss_and_gradients(build_gpt(config, tp, dropped=[1, 2, 3], kept=8), batch)
    assert calls == [3 * tokens for tokens in (24, 8, 8, 8, 24)]
    torch.testing.assert_close(packed[0], masked[0], rtol=1e-6, atol=0.0)
    assert_gradients_close(packed[1], masked[1])
    with torch.no_grad():
        torch.testing.assert_close(run(build_gpt(config, tp).eval(), batch), scores, rtol=1e-5, atol=1e-5)


def test_padding_is_a_document_of_its_own_to_the_kernel(tp: TensorParallel, monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT: losses, gradients and scores are those of a mask, where layers keep all tokens, some, or padding alone."""
    config = tiny_config(family="bert")
    batch = tiny_bert_batch(config) | {"kept": torch.arange(24 - 8, 24).repeat(3, 1)}  # the second has padding there
    drops: dict[str, Any] = {"dropped": [1, 2, 3], "kept": 8, "shared": True}

    def summed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = build_model(config, tp, **drops)
        losses = run(model, batch)
        losses.sum().backward()
        return losses.detach(), whole_gradients(model)

    def scored() -> torch.Tensor:
        return run(build_model(config, tp).eval(), {name: x for name, x in batch.items() if name != "kept"})

    masked, scores = summed(), scored()
    calls: list[int] = []
    monkeypatch.setattr(context, "has_kernel", lambda *_: True)
    monkeypatch.setattr(document_attention, "varlen_attn", stand_in(calls, causal=False))
    packed = summed()
    assert calls == [3 * tokens for tokens in (24, 8, 8, 8, 24)]
    torch.testing.assert_close(packed[0], masked[0], rtol=1e-6, atol=0.0)
    assert_gradients_close(packed[1], masked[1])
    torch.testing.assert_close(scored(), scores, rtol=1e-5, atol=1e-5)


def test_documents_are_found_and_their_number_is_bounded() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 4, 7]])  # a document does not reach into the next sample
    assert document_attention.most_documents(ids) == 64 and document_attention.most_documents(
        torch.arange(65)[None]) == 128
    found = document_attention.find_documents(ids, 7, causal=True)
    assert found.starts.tolist() == [0, 2, 5, 8, 9, 10, 10, 10] and found.longest == 5
