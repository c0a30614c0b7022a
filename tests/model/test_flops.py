"""FLOPs of a sample against torch's counter, which counts what the model really multiplies."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ltd.model.flops import head_flops, layer_flops, sample_flops
from megatron_ltd.parallel.collectives import TensorParallel
from tests.model.tiny import GPT2_LIKE, LLAMA_LIKE, build_gpt, run, tiny_batch, tiny_config


def in_place_addmm(total: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
    """The counter knows this product out of place only; the head adds up the gradient of its weight in place."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("settings", [GPT2_LIKE, LLAMA_LIKE, LLAMA_LIKE | {"kv_channels": 12, "num_query_groups": 1}],
                         ids=["GPT-2", "Llama", "odd heads"])
@pytest.mark.parametrize(("dropped", "keep"), [([], 24), ([1, 2, 3], 6), ([0, 4], 1)])
def test_flops_are_those_that_torch_counts(tp: TensorParallel, settings: dict[str, Any], dropped: list[int],
                                           keep: int) -> None:
    """With attention spelled out, torch counts all k x k pairs of each head where we count the causal ones."""
    config = tiny_config(**settings, attention_dropout=0.1)
    samples = 2
    model = build_gpt(config, tp, dropped=dropped, kept=keep)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_addmm}) as counter:
        run(model, tiny_batch(config, samples)).backward()
    lengths = [keep if layer in dropped else config.seq_length for layer in range(config.num_layers)]
    per_pair = 2 * 2 * config.head_dim * config.num_attention_heads  # a score and a weighted value, multiply and add
    not_causal = 3 * sum(per_pair * (k * k - k * (k + 1) // 2) for k in lengths)
    assert counter.get_total_flops() == samples * (sample_flops(config, dropped, keep) + not_causal)


def test_one_layer_by_hand() -> None:
    """Width 32, 4 query heads and 2 key/value heads of 8 channels, SwiGLU of 48, on 6 tokens."""
    config = tiny_config(**LLAMA_LIKE)
    qkv, proj, mlp = 6 * 32 * (32 + 16 + 16), 6 * 32 * 32, 6 * 32 * 48 * 3
    pairs = 1 + 2 + 3 + 4 + 5 + 6
    assert layer_flops(config, 6) == 2 * (qkv + proj + mlp) + 2 * pairs * 4 * 8 * 2
    assert head_flops(config) == 2 * 24 * 32 * 61  # the vocabulary, not its padding
    assert sample_flops(config, [1, 2, 3], 6) == 3 * (
        2 * layer_flops(config, 24) + 3 * layer_flops(config, 6) + 2 * 24 * 32 * 61)


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
