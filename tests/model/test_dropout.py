"""Dropout masks: their rate and independence, and that they belong to tokens rather than to a layout."""

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megatron_ltd.model.attention import dropout as attention_dropout
from megatron_ltd.model.attention.context import ContextMaker, Microbatch
from megatron_ltd.model.attention.layer import Attention, TokenContext
from megatron_ltd.model.dropout import dropout, keep_mask, token_keys
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import GPT2_LIKE, LLAMA_LIKE, build_gpt, documents, loss_and_gradients, tiny_batch, tiny_config

NORMAL_QUANTILE = 3.2905
"""|z| of a standard normal is larger once in 1000 draws."""


def keys(layer: int = 0, site: int = 0, seed: int = 1234, first_sample: int = 0, samples: int = 8,
         tokens: int = 64) -> torch.Tensor:
    ids = torch.arange(first_sample, first_sample + samples)
    return token_keys(seed, layer, site, ids, torch.arange(tokens)[:, None])


def mask(probability: float, channels: int = 128, **place: int) -> torch.Tensor:
    """Shapes: -> [s, b, c]"""
    return keep_mask(keys(**place)[..., None], torch.arange(channels, dtype=torch.int32), probability)


def rate_score(kept: torch.Tensor, rate: float) -> float:
    """How far the share of True is from its expectation, in standard deviations."""
    return float((kept.double().mean() - rate) / math.sqrt(rate * (1.0 - rate) / kept.numel()))


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_channels_is_the_probability(probability: float) -> None:
    kept = mask(probability, tokens=256, samples=16)
    assert abs(rate_score(kept, 1.0 - probability)) < NORMAL_QUANTILE
    # Along every axis the counts scatter as those of independent draws: mean square deviation 1.
    for axes in ((1, 2), (0, 2), (0, 1)):
        counts = kept.double().sum(axes)
        draws = kept.numel() / counts.numel()
        squares = (counts - draws * (1.0 - probability)).square() / (draws * probability * (1.0 - probability))
        spread = math.sqrt(2.0 / counts.numel())
        assert abs(float(squares.mean()) - 1.0) < 4.0 * spread


def test_probability_zero_keeps_everything() -> None:
    assert bool(mask(0.0).all())


def test_masks_at_different_places_are_independent() -> None:
    plain = mask(0.5)
    others = {
        "next layer": mask(0.5, layer=1), "next site": mask(0.5, site=1), "site after that": mask(0.5, site=2),
        "next seed": mask(0.5, seed=1235), "other samples": mask(0.5, first_sample=8),
        "next sample": mask(0.5, first_sample=1), "next token": plain.roll(1, 0), "next channel": plain.roll(1, 2),
        "channel 16 further": plain.roll(16, 2), "next token and channel": plain.roll((1, 1), (0, 2)),
        "next token, channel before": plain.roll((1, -1), (0, 2)),
    }
    scores = {name: rate_score(plain == other, 0.5) for name, other in others.items()}
    assert {name: score for name, score in scores.items() if abs(score) > NORMAL_QUANTILE} == {}


def test_what_is_kept_is_scaled_up() -> None:
    x = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = dropout(x, keys(), 0.25)
    kept = mask(0.25, channels=32)
    torch.testing.assert_close(out, torch.where(kept, x / 0.75, 0.0))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, kept / 0.75)


def test_without_keys_nothing_is_touched() -> None:
    x = torch.randn(4, 2, 8)
    assert dropout(x, None, 0.5) is x


def attention_mask(tp: TensorParallel, tokens: TokenContext, samples: int, probability: float) -> torch.Tensor:
    """The dropout mask of the attention core, from uniform scores and a value that is the unit matrix.

    Shapes: -> [b, n, k, k] bool
    """
    length = 16
    config = tiny_config(hidden_size=64, attention_dropout=probability, seq_length=length)
    core = Attention(config, tp)._core
    zeros = torch.zeros(samples, 4, length, length)
    out = core(zeros, zeros, torch.eye(length).expand_as(zeros), tokens)
    rows = torch.arange(1, length + 1)[:, None]
    torch.testing.assert_close(out[out > 0], ((out > 0) / (rows * (1.0 - probability)))[out > 0])
    assert not bool(out.triu(1).any())
    return out > 0


def attention_context(tp: TensorParallel, samples: int, probability: float) -> TokenContext:
    config = tiny_config(hidden_size=64, attention_dropout=probability, seq_length=16)
    return in_layer(ContextMaker(config, tp, 1234, True, Microbatch(16, torch.arange(samples))), 2)


def in_layer(contexts: ContextMaker, layer: int, kept: torch.Tensor | None = None) -> TokenContext:
    return contexts.in_layer(contexts.of(kept), layer, kept)


def test_attention_dropout_is_independent_over_heads_queries_keys_and_samples(tp: TensorParallel) -> None:
    samples, probability = 300, 0.3
    kept = attention_mask(tp, attention_context(tp, samples, probability), samples, probability)
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    assert abs(rate_score(kept[..., causal], 0.7)) < NORMAL_QUANTILE
    # Pairs of places that are both below the diagonal.
    agreement = 0.7**2 + 0.3**2
    pairs = {
        "heads": kept[:, :-1][..., causal] == kept[:, 1:][..., causal],
        "first and last head": kept[:, 0][..., causal] == kept[:, 3][..., causal],
        "samples": kept[:-1][..., causal] == kept[1:][..., causal],
        "queries": (kept[..., :-1, :] == kept[..., 1:, :])[..., causal[:-1]],
        "keys": (kept[..., 1:, :-1] == kept[..., 1:, 1:])[..., causal[:-1, :-1]],
    }
    scores = {name: rate_score(pair, agreement) for name, pair in pairs.items()}
    assert {name: score for name, score in scores.items() if abs(score) > 4.5} == {}  # pairs overlap, so not normal


def test_a_dropped_layer_uses_the_masks_of_the_tokens_it_keeps(tp: TensorParallel) -> None:
    """A token's mask does not depend on which other tokens are there."""
    config = tiny_config(hidden_dropout=0.5, attention_dropout=0.5)
    contexts = ContextMaker(config, tp, 7, True, Microbatch(24, torch.tensor([3, 8])))
    kept = torch.tensor([[0, 5, 6, 20], [2, 3, 22, 23]])
    full, part = in_layer(contexts, 2), in_layer(contexts, 2, kept)
    assert full.hidden_keys is not None and part.hidden_keys is not None
    for all_keys, kept_keys in zip(full.hidden_keys, part.hidden_keys, strict=True):
        assert torch.equal(kept_keys, all_keys.gather(0, kept.t()))
    assert full.attention_keys is not None and part.attention_keys is not None
    whole, some = (keep_mask(*both, 0.5).expand(2, 1, n, n)
                   for both, n in ((full.attention_keys, 24), (part.attention_keys, 4)))
    for b in range(2):
        assert torch.equal(some[b, 0], whole[b, 0][kept[b]][:, kept[b]])


def test_no_two_places_of_the_network_share_their_keys(tp: TensorParallel) -> None:
    config = tiny_config(hidden_dropout=0.5, attention_dropout=0.5)
    contexts = ContextMaker(config, tp, 7, True, Microbatch(24, torch.arange(3)))
    embedding = contexts.embedding_keys()
    assert embedding is not None
    found = [embedding]
    for layer in range(config.num_layers):
        of_layer = in_layer(contexts, layer)
        assert of_layer.hidden_keys is not None and of_layer.attention_keys is not None
        found += [*of_layer.hidden_keys, of_layer.attention_keys[0]]
    keys_of_tokens = torch.cat([keys.flatten() for keys in found])
    assert len(keys_of_tokens) == 16 * 24 * 3
    assert len(keys_of_tokens.unique()) == len(keys_of_tokens)


def test_evaluation_has_no_dropout_keys(tp: TensorParallel) -> None:
    config = tiny_config(hidden_dropout=0.5, attention_dropout=0.5)
    contexts = ContextMaker(config, tp, 7, False, Microbatch(24, torch.arange(2)))
    assert contexts.embedding_keys() is None
    assert in_layer(contexts, 0).hidden_keys is None and in_layer(contexts, 0).attention_keys is None


@pytest.mark.parametrize("with_documents", [False, True])
def test_attention_spelled_out_for_dropout_is_the_fused_one(tp: TensorParallel, with_documents: bool) -> None:
    """With a probability so small that nothing is dropped."""
    batch = tiny_batch(tiny_config()) | (documents(tiny_config()) if with_documents else {})
    results = [loss_and_gradients(build_gpt(tiny_config(**LLAMA_LIKE, attention_dropout=p), tp, dropped=[1, 3],
                                            kept=8), batch) for p in (0.0, 1e-9)]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0.0)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=0.0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("settings", [{}, {"position_embedding_type": "alibi"}, {"family": "bert"}],
                         ids=["causal", "alibi", "padding"])
@pytest.mark.parametrize("heads_at_once", [1, 3, 8], ids=["one head", "three heads", "two samples"])
def test_parts_of_attention_with_dropout_are_the_whole_and_keep_no_scores(
        tp: TensorParallel, settings: dict[str, Any], heads_at_once: int) -> None:
    samples, heads, length = 5, 4, 12
    config = tiny_config(**settings, attention_dropout=0.3, seq_length=length)
    batch = Microbatch(length, torch.arange(samples))
    if settings.get("family") == "bert":
        batch = replace(batch, padding_mask=torch.arange(length) < torch.arange(8, 8 + samples)[:, None])
    tokens = in_layer(ContextMaker(config, tp, 7, True, batch), 1)
    assert tokens.attention_keys is not None

    def attend(at_once: int) -> tuple[list[torch.Tensor], list[int]]:
        generator, kept = torch.Generator().manual_seed(0), []
        inputs = [torch.randn(samples, heads, length, 4, generator=generator, requires_grad=True) for _ in range(3)]
        with mock.patch.dict(attention_dropout._SCORES_AT_ONCE, cpu=at_once * length * length), \
                torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = attention_dropout.attend_with_dropout(
                *inputs, tokens.mask, tokens.attention_keys, 0.3, causal=tokens.causal, first_head=0,
                most_tokens=length)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in inputs if x.grad is not None)], kept

    (whole, _), (parts, kept) = attend(samples * heads), attend(heads_at_once)
    assert len(parts) == 4 and all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert max(kept) < samples * heads * length * length


def test_compiled_attention_with_dropout_has_one_graph_for_all_numbers_of_tokens(tp: TensorParallel) -> None:
    config = tiny_config(attention_dropout=0.3, seq_length=64)
    contexts = ContextMaker(config, tp, 7, True, Microbatch(64, torch.arange(3)))
    frames = CompileCounter()
    compiled = torch.compile(attention_dropout.attend_with_dropout, backend=frames, fullgraph=True, dynamic=True)
    for kept in (8, 12, 32):
        positions = torch.arange(kept).expand(3, -1).contiguous()
        tokens = in_layer(contexts, 1, positions)
        inputs = [torch.randn(3, 4, kept, 4) for _ in range(3)]
        with mock.patch.dict(attention_dropout._SCORES_AT_ONCE, cpu=5 * 64 * 64):
            found, expected = (attend(*inputs, None, tokens.attention_keys, 0.3, causal=True, first_head=0,
                                      most_tokens=64) for attend in (compiled, attention_dropout.attend_with_dropout))
        torch.testing.assert_close(found, expected)
    assert frames.frame_count == 1


def test_the_embedding_and_both_halves_of_every_layer_are_dropped_out(tp: TensorParallel) -> None:
    config = tiny_config(**GPT2_LIKE, hidden_dropout=0.5)
    model = build_gpt(config, tp)
    seen: dict[str, torch.Tensor] = {}
    assert model.embedding is not None
    for name, module in model.named_modules():
        if name.endswith(("embedding", "attention", "mlp")) or name in {f"stack.blocks.{i}" for i in range(5)}:
            module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.detach()))
    loss_and_gradients(model, tiny_batch(config))
    masks = [seen["embedding"] != 0]
    for layer in range(5):
        name = f"stack.blocks.{layer}"
        attention, mlp = 2.0 * seen[f"{name}.attention"], 2.0 * seen[f"{name}.mlp"]
        update = seen[name]
        # Each entry of the update is one of the four sums; which one tells what was dropped.
        candidates = torch.stack((torch.zeros_like(update), attention, mlp, attention + mlp))
        choice = (candidates - update).abs().argmin(0)
        torch.testing.assert_close(candidates.gather(0, choice[None])[0], update)
        masks += [choice % 2 == 1, choice >= 2]
    for i, one in enumerate(masks):
        assert abs(rate_score(one, 0.5)) < NORMAL_QUANTILE
        for other in masks[:i]:
            assert abs(rate_score(one == other, 0.5)) < 4.5  # 55 pairs
