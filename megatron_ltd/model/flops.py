"""Floating-point operations of one sample, forward and backward, as the model's mathematics needs them.

For a layer that processes k tokens of a sample (a multiply-add counts two):

    projections    2 k h d (n + 2 g)  +  2 k n d h        query/key/value and output
    attention      4 n d k (k + 1) / 2                    scores and weighted values, causal pairs only
    mlp            2 k h f (2, or 3 with SwiGLU)
    head           2 s h v                                all tokens of the sample, real vocabulary

The backward pass takes twice the forward pass. Recomputation is not counted: it is not the model's work. Norms,
embeddings and dropout are left out, as in Megatron-LM's and PaLM's counts.
"""

from collections.abc import Collection

from megatron_ltd.config import ModelConfig


def layer_flops(config: ModelConfig, kept_tokens: int) -> int:
    """Forward operations of one layer for one sample of which it processes `kept_tokens`."""
    k, h, d = kept_tokens, config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.query_groups
    projections = 2 * k * h * d * (heads + 2 * groups) + 2 * k * heads * d * h
    attention = 2 * heads * d * k * (k + 1)
    mlp = 2 * k * h * config.ffn * (3 if config.swiglu else 2)
    return projections + attention + mlp


def head_flops(config: ModelConfig) -> int:
    """Forward operations of the head for one sample."""
    assert config.vocab_size is not None
    return 2 * config.seq_length * config.hidden_size * config.vocab_size


def sample_flops(config: ModelConfig, dropped_layers: Collection[int] = (), kept_tokens: int | None = None) -> int:
    """Forward and backward operations of the whole model for one sample.

    Args:
        dropped_layers: layers that process only `kept_tokens`; the others process the whole sample.
    """
    kept = config.seq_length if kept_tokens is None else min(kept_tokens, config.seq_length)
    full_layers = config.num_layers - len(dropped_layers)
    forward = full_layers * layer_flops(config, config.seq_length) + len(dropped_layers) * layer_flops(config, kept)
    return 3 * (forward + head_flops(config))
