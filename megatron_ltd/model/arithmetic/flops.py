"""Floating-point operations of one sample, forward and backward, that the model's mathematics requires.

For a layer that processes k tokens of a sample (a multiply-add counts two):

    projections    2 k h d n + 4 c h d g + 2 k n d h      query, key and value, output; c keys: k, or all s
    convolution    2 (K - 1) (k d n + 2 c d g)            of queries, keys and values, K wide
    attention      4 n d x pairs                          scores and weighted values
    mlp            2 k h f (2, or 3 with SwiGLU)
    router         2 s h, and as much for its predictor   Mixture-of-Depths: scores of all tokens

    pairs          causal k (k + 1) / 2, with keys of all tokens k (s + 1) / 2; bidirectional k c;
                   with a sliding window those within it, on average over the sets of k tokens
    head of GPT    2 s h v                                all tokens of the sample, real vocabulary
    head of ViT    2 h v                                  the class token; v classes
    patches of ViT 2 (s - 1) h c q^2                      of q x q pixels of c channels
    head of BERT   2 p (h h + h v) + 2 h h + 4 h          p predicted tokens; the sentence-order head

The backward pass takes twice the forward pass, except for patches and predictors, where it takes as much as forward
since their input needs no gradient, and for layers without a backward pass. Recomputation is not counted, since it is
not work of the model. Norms, embedding tables and dropout are omitted, as in Megatron-LM's and PaLM's counts.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.token_drop.plan import StepPlan


def layer_flops(config: ModelConfig, kept_tokens: int, *, attends_to_all: bool = False, windowed: bool = False) -> int:
    """Forward operations of one layer that processes `kept_tokens` of one sample.

    Args:
        windowed: the layer has the model's sliding window.
        attends_to_all: keys and values are those of the whole sample.
    """
    return product_flops(config, kept_tokens, attends_to_all=attends_to_all) + attention_flops(
        config, kept_tokens, attends_to_all=attends_to_all, windowed=windowed)


def product_flops(config: ModelConfig, kept_tokens: int, *, attends_to_all: bool = False) -> int:
    """Those of the products with weights."""
    k, h, d = kept_tokens, config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.query_groups
    keys = config.seq_length if attends_to_all else k
    projections = 2 * k * h * d * heads + 4 * keys * h * d * groups + 2 * k * heads * d * h
    if config.qkv_conv_kernel is not None:
        projections += 2 * (config.qkv_conv_kernel - 1) * (k * d * heads + 2 * keys * d * groups)
    return projections + 2 * k * h * config.ffn * (3 if config.swiglu else 2)


def attention_flops(config: ModelConfig, kept_tokens: int, *, attends_to_all: bool = False,
                    windowed: bool = False) -> int:
    """Those of scores and weighted values."""
    k, keys = kept_tokens, config.seq_length if attends_to_all else kept_tokens
    pairs_twice = k * (keys + 1) if config.family == "gpt" else 2 * k * keys
    if windowed:
        pairs_twice = _pairs_in_window_twice(config, k, attends_to_all)
    return 2 * config.num_attention_heads * config.head_dim * pairs_twice


def _pairs_in_window_twice(config: ModelConfig, kept_tokens: int, attends_to_all: bool) -> int:
    """Twice the pairs of a token and one it attends to: itself, and earlier ones within the window."""
    assert config.window_size is not None
    s, k = config.seq_length, kept_tokens
    before = min(config.window_size[0], s - 1)
    others_twice = before * (2 * s - before - 1)
    if attends_to_all:
        return 2 * k + others_twice * k // s
    return 2 * k + (others_twice * k * (k - 1) // (s * (s - 1)) if s > 1 else 0)


def head_flops(config: ModelConfig, predictions: int | None = None) -> int:
    """Forward operations of the head for one sample.

    Args:
        predictions: tokens of a sample that BERT predicts; None for GPT, which predicts all, and for ViT.
    """
    h = config.hidden_size
    if config.family == "vit":
        assert config.num_classes is not None
        return 2 * h * config.num_classes
    assert config.vocab_size is not None
    if predictions is None:
        return 2 * config.seq_length * h * config.vocab_size
    sentence_order = 2 * h * h + 4 * h if config.has_binary_head else 0
    return 2 * predictions * h * (h + config.vocab_size) + sentence_order


def patch_flops(config: ModelConfig) -> int:
    """Forward operations of ViT's patch embedding for one image; 0 for other models, whose embedding is a table."""
    return 2 * (config.seq_length - 1) * config.hidden_size * config.patch_values if config.family == "vit" else 0


def plan_flops(config: ModelConfig, plan: StepPlan, predictions: int | None = None) -> int:
    """Forward and backward operations of the whole model for one sample under a step's plan.

    Args:
        predictions: see `head_flops`.
    """
    read = cut_to(config, plan.read_tokens)
    layers = sum((3 if layer.backward else 1) * layer_flops(read, layer.tokens, attends_to_all=layer.attends_to_all,
                                                            windowed=config.is_windowed(number))
                 for number, layer in enumerate(plan.layers) if not layer.skipped)
    scores = 2 * read.seq_length * config.hidden_size
    routers = sum((3 + 2 if layer.backward else 2) * scores for number, layer in enumerate(plan.layers)
                  if config.is_routed(number) and not layer.skipped)
    return layers + routers + 3 * head_flops(read, predictions) + 2 * patch_flops(config)


def cut_to(config: ModelConfig, read_tokens: int) -> ModelConfig:
    """The same model on samples of which only the first tokens are read."""
    return config if read_tokens == config.seq_length else replace(config, seq_length=read_tokens)


def newton_schulz_flops(shape: Sequence[int], rows: Sequence[int]) -> int:
    """Operations of one of Muon's iterations on a weight: two products with the smaller side of each of its matrices,
    and a square of it.

    Args:
        shape: of the weight, [o, i].
        rows: of the matrices in it that alternate, as `layer_matrices` has them; one number for a single matrix.
    """
    blocks, total = shape[0] // sum(rows), 0
    for count in rows:
        small, large = sorted((blocks * count, shape[1]))
        total += 4 * small * small * large + 2 * small ** 3
    return total
