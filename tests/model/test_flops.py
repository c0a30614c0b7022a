"""FLOPs of a sample against torch's counter, which counts what the model really multiplies."""

from collections.abc import Collection
from typing import Any

import pytest
import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.flops import head_flops, layer_flops, plan_flops
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import (
    GPT2_LIKE,
    LLAMA_LIKE,
    build_gpt,
    build_model,
    counted_flops,
    run,
    tiny_batch,
    tiny_bert_batch,
    tiny_config,
)
from tests.plans import plan_of


def sample_flops(config: ModelConfig, dropped: Collection[int] = (), kept: int | None = None, *,
                 cross_layer: int | None = None, predictions: int | None = None) -> int:
    """Of a sample of which dropped layers keep so many tokens."""
    plan = plan_of(config.seq_length, config.num_layers, kept, dropped, attends_to_all=cross_layer)
    return plan_flops(config, plan, predictions)


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE, LLAMA_LIKE | {"kv_channels": 12, "num_query_groups": 1}],
                         ids=["GPT-2", "Llama", "odd heads"])
@pytest.mark.parametrize(("dropped", "keep"), [([], 24), ([1, 2, 3], 6), ([0, 4], 1)])
def test_flops_are_those_that_torch_counts(tp: TensorParallel, settings: dict[str, Any], dropped: list[int],
                                           keep: int) -> None:
    """With attention spelled out, torch counts all k x k pairs of each head where we count the causal ones. We do not
    count the vocabulary's padding, so here it has none."""
    config = tiny_config(**settings, vocab_size=64)
    samples = 2
    model = build_gpt(config, tp, dropped=dropped, kept=keep)
    with counted_flops() as counter:
        run(model, tiny_batch(config, samples)).backward()
    lengths = [keep if layer in dropped else config.seq_length for layer in range(config.num_layers)]
    per_pair = 2 * 2 * config.head_dim * config.num_attention_heads  # a score and a weighted value, multiply and add
    not_causal = 3 * sum(per_pair * (k * k - k * (k + 1) // 2) for k in lengths)
    assert counter.get_total_flops() == samples * (sample_flops(config, dropped, keep) + not_causal)


@pytest.mark.parametrize("binary_head", [True, False])
@pytest.mark.parametrize(("dropped", "cross"), [([], None), ([1, 2, 3], None), ([2, 3], 2)])
def test_flops_of_bert_are_those_that_torch_counts(tp: TensorParallel, binary_head: bool, dropped: list[int],
                                                   cross: int | None) -> None:
    config = tiny_config(family="bert", bert_no_binary_head=not binary_head, vocab_size=64)
    model = build_model(config, tp, dropped=dropped, kept=6, shared=True, cross_layer=cross)
    batch = tiny_bert_batch(config) | {"kept": torch.arange(6).repeat(3, 1)}
    with counted_flops() as counter:
        run(model, batch).sum().backward()
    assert counter.get_total_flops() == 3 * sample_flops(config, dropped, 6, cross_layer=cross, predictions=5)


def test_a_cross_layer_of_gpt_by_hand() -> None:
    """6 of 24 tokens: queries, output and MLP of 6, keys and values of 24, and half of the 6 x 24 pairs and 6 / 2."""
    config = tiny_config()
    projections, mlp = 6 * 32 * 32 * 2 + 24 * 32 * 32 * 2, 6 * 32 * 128 * 2
    assert layer_flops(config, 6, attends_to_all=True) == 2 * (projections + mlp) + 2 * 2 * 4 * 8 * (6 * 25 // 2)


def test_token_dropping_of_bert_saves_the_quarter_that_is_published() -> None:
    """BERT-base at 512 tokens of which 256 are kept (https://arxiv.org/abs/2203.13240): layers cost .746 of the whole,
    and .755 with 76 predictions."""
    config = tiny_config(family="bert", num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=512,
                         vocab_size=30522, bert_no_binary_head=True)
    dropped = range(5, 11)
    layers = sum(layer_flops(config, 256 if layer in dropped else 512, attends_to_all=layer == 5)
                 for layer in range(12))
    assert layers / (12 * layer_flops(config, 512)) == pytest.approx(0.746, abs=5e-4)
    whole = sample_flops(config, predictions=76)
    assert sample_flops(config, dropped, 256, cross_layer=5, predictions=76) / whole == pytest.approx(0.755, abs=1e-3)


def test_one_layer_by_hand() -> None:
    """Width 32, 4 query heads and 2 key/value heads of 8 channels, SwiGLU of 48, on 6 tokens."""
    config = tiny_config(**LLAMA_LIKE)
    qkv, proj, mlp = 6 * 32 * (32 + 16 + 16), 6 * 32 * 32, 6 * 32 * 48 * 3
    pairs = 1 + 2 + 3 + 4 + 5 + 6
    assert layer_flops(config, 6) == 2 * (qkv + proj + mlp) + 2 * pairs * 4 * 8 * 2
    assert head_flops(config) == 2 * 24 * 32 * 61  # the vocabulary, not its padding
    assert sample_flops(config, [1, 2, 3], 6) == 3 * (
        2 * layer_flops(config, 24) + 3 * layer_flops(config, 6) + 2 * 24 * 32 * 61)


@pytest.mark.parametrize("keep", [24, 6])
def test_a_window_counts_the_pairs_within_it(keep: int) -> None:
    """The mean over all sets of kept tokens, pair by pair: another token is kept with probability (k - 1) / (s - 1)."""
    config = tiny_config(window_size=(5, 0), window_attn_skip_freq=(2,))
    within = sum(0 < i - j <= 5 for i in range(24) for j in range(24))
    pairs = keep + within * keep * (keep - 1) / (24 * 23)
    dense = layer_flops(config, keep) - 2 * 2 * 4 * 8 * keep * (keep + 1) // 2
    assert layer_flops(config, keep, windowed=True) == pytest.approx(dense + 2 * 2 * 4 * 8 * pairs, abs=64)
    cross = 2 * 2 * 4 * 8 * (24 + within) * keep / 24
    dense = layer_flops(config, keep, attends_to_all=True) - 2 * 2 * 4 * 8 * keep * 25 // 2
    assert layer_flops(config, keep, attends_to_all=True, windowed=True) == pytest.approx(dense + cross, abs=64)
    assert sample_flops(config) == 3 * (3 * layer_flops(config, 24, windowed=True) + 2 * layer_flops(config, 24)
                                        + head_flops(config))


def test_a_kept_length_beyond_the_sequence_is_the_sequence() -> None:
    config = tiny_config()
    assert sample_flops(config, [1, 2], 1000) == sample_flops(config, [1, 2], 24) == sample_flops(config)


def test_a_known_model_costs_what_is_published() -> None:
    """GPT-3 1.3B: about 6 FLOPs per weight and token, and attention on top of it."""
    config = tiny_config(num_layers=24, hidden_size=2048, num_attention_heads=16, seq_length=2048, vocab_size=50257,
                         make_vocab_size_divisible_by=128)
    weights = 24 * 12 * 2048**2 + 50257 * 2048
    attention = 24 * 3 * 4 * 2048 * 2048 * 2049 // 2
    assert sample_flops(config) == 6 * weights * 2048 + attention
