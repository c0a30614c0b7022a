"""Names and global shapes of a model's parameters, as in checkpoints: plain arithmetic, without building the model."""

import math
from dataclasses import replace

from megatron_ltd.config.model import ModelConfig

TOKEN_TYPES, SENTENCE_ORDERS = 2, 2

VOCABULARY = ("embedding.word.weight", "head.weight", "lm_head.bias")
"""Parameters with a row for each token."""
CONVOLUTION = "attention.conv.weight"
"""A layer's weights of earlier tokens, by channel and distance: no matrix, though they have two dimensions."""
NGRAMS = "embedding.ngram.weight"
"""The table of n-grams."""

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape by global name, from the embedding to the head."""
    if config.family == "vit":
        return _vit(config)
    h, vocabulary = config.hidden_size, config.padded_vocab_size
    shapes: dict[str, Shape] = {"embedding.word.weight": (vocabulary, h)}
    if config.ngram_rows is not None:
        shapes[NGRAMS] = ((config.ngram_length - 1) * config.ngram_rows, h)
    if config.embed_layernorm:
        shapes |= _norm(config, "embedding.norm")
    if config.position_embedding_type == "learned_absolute":
        shapes["embedding.position.weight"] = (config.max_positions, h)
    if config.has_binary_head:
        shapes["embedding.token_type.weight"] = (TOKEN_TYPES, h)
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _layer(config).items()}
        if config.is_routed(layer):
            shapes |= _linear(f"layers.{layer}.router.score", 1, h, False)
            shapes |= _linear(f"layers.{layer}.router.predictor", 1, h, True)
    shapes |= _norm(config, "final_norm")
    if not config.tied:
        shapes["head.weight"] = (vocabulary, h)
    if config.family == "bert":
        shapes |= _linear("lm_head.dense", h, h, True) | _norm(config, "lm_head.norm")
        shapes["lm_head.bias"] = (vocabulary,)
    if config.has_binary_head:
        shapes |= _linear("pooler", h, h, True) | _linear("binary_head", SENTENCE_ORDERS, h, True)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Numbers in all parameters, without the rows that pad the vocabulary."""
    real = replace(config, make_vocab_size_divisible_by=1) if config.family != "vit" else config
    return sum(math.prod(shape) for shape in parameter_shapes(real).values())


def layer_matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The row counts of a layer's matrices, by name suffix. Query, key and value are fused: their rows alternate, and
    the three sizes are those of one group of heads."""
    rows: dict[str, tuple[int, ...]] = {name: (shape[0],) for name, shape in _layer(config).items()
                                        if len(shape) == 2 and name != CONVOLUTION}
    queries = config.num_attention_heads // config.query_groups
    return rows | {"attention.qkv.weight": (queries * config.head_dim, config.head_dim, config.head_dim)}


def _vit(config: ModelConfig) -> dict[str, Shape]:
    h = config.hidden_size
    assert config.num_classes is not None
    shapes: dict[str, Shape] = {"embedding.class_token": (h,), "embedding.position.weight": (config.seq_length, h)}
    shapes |= _linear("embedding.patch", h, config.patch_values, True)
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _layer(config).items()}
    return shapes | _norm(config, "final_norm") | _linear("classifier", config.num_classes, h, True)


def _layer(config: ModelConfig) -> dict[str, Shape]:
    h, d, heads, groups = config.hidden_size, config.head_dim, config.num_attention_heads, config.query_groups
    fused = (heads + 2 * groups) * d
    shapes = _norm(config, "attention_norm") | _linear("attention.qkv", fused, h, config.qkv_bias)
    if config.qkv_conv_kernel is not None:
        shapes[CONVOLUTION] = (fused, config.qkv_conv_kernel - 1)
    shapes |= _linear("attention.proj", h, heads * d, config.proj_bias)
    if config.qk_layernorm:
        widths = (heads * d, groups * d) if config.qk_layernorm_all_heads else (d, d)
        for name, width in zip(("query", "key"), widths, strict=True):
            shapes |= _norm(config, f"attention.{name}_norm", width)
    shapes |= _norm(config, "mlp_norm")
    for name in ("gate", "up") if config.swiglu else ("fc1",):
        shapes |= _linear(f"mlp.{name}", config.ffn, h, config.mlp_bias)
    return shapes | _linear("mlp.fc2", h, config.ffn, config.mlp_bias)


def _linear(name: str, out: int, into: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _norm(config: ModelConfig, name: str, width: int | None = None) -> dict[str, Shape]:
    shape: Shape = (width or config.hidden_size,)
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape} if config.normalization == "LayerNorm" else {})
