"""Which of our tensors holds which of theirs, family by family.

    gpt2            GPT-2: learned positions, LayerNorm, GELU, biases
    llama           Llama, Mistral, Qwen2: rotary positions, RMSNorm, SwiGLU, grouped queries, biases or not
    megatron-bert   pre-norm BERT with masked-token and sentence-order heads
    vit             images as patches, a classifier on the class token
"""

from collections.abc import Callable, Iterator

from megatron_ltd.checkpoint.convert.huggingface.layout import (
    Layout,
    Mapped,
    fused_transposed_qkv,
    rows,
    same,
    separate_qkv,
    shaped,
    transposed,
)
from megatron_ltd.config import ModelConfig
from megatron_ltd.model.shapes import SENTENCE_ORDERS, TOKEN_TYPES


def mapping(family: str, config: ModelConfig) -> list[Mapped]:
    """Every tensor of a model; ours without the checkpoint's prefix, theirs as `transformers` saves them."""
    return list(FAMILIES[family](config))


def base_prefix(family: str) -> str:
    """What a file without heads leaves out of its names."""
    return {"gpt2": "transformer.", "llama": "model.", "megatron-bert": "bert.", "vit": "vit."}[family]


def tied_copies(family: str, config: ModelConfig) -> dict[str, str]:
    """Their names that may stand in a file a second time: copy -> what it must equal."""
    if family == "vit":
        return {}
    embedding = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight",
                 "megatron-bert": "bert.embeddings.word_embeddings.weight"}[family]
    if family == "megatron-bert":
        bias = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
        return bias | ({"cls.predictions.decoder.weight": embedding} if config.tied else {})
    return {"lm_head.weight": embedding} if config.tied else {}


def is_constant(name: str) -> bool:
    """Masks, positions and frequencies that some files hold besides the weights, and that follow from the settings."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "embeddings.position_ids"))


def _embedding(config: ModelConfig, ours: str, theirs: str) -> Mapped:
    assert config.vocab_size is not None
    return Mapped(ours, (config.padded_vocab_size, config.hidden_size), (theirs,), rows(config.vocab_size))


def _linear(ours: str, out: int, into: int, theirs: str, *, bias: bool, layout: Layout = same) -> Iterator[Mapped]:
    yield Mapped(f"{ours}.weight", (out, into), (f"{theirs}.weight",), layout)
    if bias:
        yield Mapped(f"{ours}.bias", (out,), (f"{theirs}.bias",), layout)


def _norm(config: ModelConfig, ours: str, theirs: str) -> Iterator[Mapped]:
    kinds = ("weight", "bias") if config.normalization == "LayerNorm" else ("weight",)
    for kind in kinds:
        yield Mapped(f"{ours}.{kind}", (config.hidden_size,), (f"{theirs}.{kind}",), same)


def _qkv(config: ModelConfig, ours: str, theirs: tuple[str, ...], layout: Layout, *, bias: bool) -> Iterator[Mapped]:
    features = (config.num_attention_heads + 2 * config.query_groups) * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"weight": (features, config.hidden_size)}
    if bias:
        shapes["bias"] = (features,)
    for kind, shape in shapes.items():
        yield Mapped(f"{ours}.{kind}", shape, tuple(f"{name}.{kind}" for name in theirs), layout)


def _gpt2(config: ModelConfig) -> Iterator[Mapped]:
    hidden = config.hidden_size
    yield _embedding(config, "embedding.word.weight", "transformer.wte.weight")
    yield Mapped("embedding.position.weight", (config.max_positions, hidden), ("transformer.wpe.weight",), same)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        yield from _norm(config, f"{ours}.attention_norm", f"{theirs}.ln_1")
        yield from _qkv(config, f"{ours}.attention.qkv", (f"{theirs}.attn.c_attn",),
                        fused_transposed_qkv(config.num_attention_heads, config.head_dim), bias=True)
        yield from _linear(f"{ours}.attention.proj", hidden, hidden, f"{theirs}.attn.c_proj", bias=True,
                           layout=transposed)
        yield from _norm(config, f"{ours}.mlp_norm", f"{theirs}.ln_2")
        yield from _linear(f"{ours}.mlp.fc1", config.ffn, hidden, f"{theirs}.mlp.c_fc", bias=True, layout=transposed)
        yield from _linear(f"{ours}.mlp.fc2", hidden, config.ffn, f"{theirs}.mlp.c_proj", bias=True, layout=transposed)
    yield from _norm(config, "final_norm", "transformer.ln_f")
    if not config.tied:
        yield _embedding(config, "head.weight", "lm_head.weight")


def _separate(config: ModelConfig) -> Layout:
    return separate_qkv(config.query_groups, config.num_attention_heads // config.query_groups, config.head_dim)


def _llama(config: ModelConfig) -> Iterator[Mapped]:
    hidden, bias = config.hidden_size, not config.disable_bias_linear
    yield _embedding(config, "embedding.word.weight", "model.embed_tokens.weight")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = f"{theirs}.self_attn"
        yield from _norm(config, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        yield from _qkv(config, f"{ours}.attention.qkv", tuple(f"{attention}.{part}_proj" for part in "qkv"),
                        _separate(config), bias=bias or config.add_qkv_bias)
        yield from _linear(f"{ours}.attention.proj", hidden, config.num_attention_heads * config.head_dim,
                           f"{attention}.o_proj", bias=bias)
        yield from _norm(config, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
        for part, name in (("gate", "gate_proj"), ("up", "up_proj")):
            yield from _linear(f"{ours}.mlp.{part}", config.ffn, hidden, f"{theirs}.mlp.{name}", bias=bias)
        yield from _linear(f"{ours}.mlp.fc2", hidden, config.ffn, f"{theirs}.mlp.down_proj", bias=bias)
    yield from _norm(config, "final_norm", "model.norm")
    if not config.tied:
        yield _embedding(config, "head.weight", "lm_head.weight")


def _megatron_bert(config: ModelConfig) -> Iterator[Mapped]:
    assert config.vocab_size is not None
    hidden = config.hidden_size
    tables = "bert.embeddings"
    yield _embedding(config, "embedding.word.weight", f"{tables}.word_embeddings.weight")
    yield Mapped("embedding.position.weight", (config.max_positions, hidden), (f"{tables}.position_embeddings.weight",),
                 same)
    yield Mapped("embedding.token_type.weight", (TOKEN_TYPES, hidden), (f"{tables}.token_type_embeddings.weight",),
                 same)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"bert.encoder.layer.{i}"
        yield from _norm(config, f"{ours}.attention_norm", f"{theirs}.attention.ln")
        yield from _qkv(config, f"{ours}.attention.qkv",
                        tuple(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")),
                        _separate(config), bias=True)
        yield from _linear(f"{ours}.attention.proj", hidden, hidden, f"{theirs}.attention.output.dense", bias=True)
        yield from _norm(config, f"{ours}.mlp_norm", f"{theirs}.ln")
        yield from _linear(f"{ours}.mlp.fc1", config.ffn, hidden, f"{theirs}.intermediate.dense", bias=True)
        yield from _linear(f"{ours}.mlp.fc2", hidden, config.ffn, f"{theirs}.output.dense", bias=True)
    yield from _norm(config, "final_norm", "bert.encoder.ln")
    head = "cls.predictions"
    yield from _linear("lm_head.dense", hidden, hidden, f"{head}.transform.dense", bias=True)
    yield from _norm(config, "lm_head.norm", f"{head}.transform.LayerNorm")
    yield Mapped("lm_head.bias", (config.padded_vocab_size,), (f"{head}.bias",), rows(config.vocab_size))
    if not config.tied:
        yield _embedding(config, "head.weight", f"{head}.decoder.weight")
    yield from _linear("pooler", hidden, hidden, "bert.pooler.dense", bias=True)
    yield from _linear("binary_head", SENTENCE_ORDERS, hidden, "cls.seq_relationship", bias=True)


def _vit(config: ModelConfig) -> Iterator[Mapped]:
    assert config.num_channels is not None and config.patch_dim is not None and config.num_classes is not None
    hidden, q = config.hidden_size, config.patch_dim
    yield Mapped("embedding.class_token", (hidden,), ("vit.embeddings.cls_token",), shaped(1, 1, hidden))
    yield Mapped("embedding.position.weight", (config.seq_length, hidden), ("vit.embeddings.position_embeddings",),
                 shaped(1, config.seq_length, hidden))
    projection = "vit.embeddings.patch_embeddings.projection"
    yield Mapped("embedding.patch.weight", (hidden, config.patch_values), (f"{projection}.weight",),
                 shaped(hidden, config.num_channels, q, q))
    yield Mapped("embedding.patch.bias", (hidden,), (f"{projection}.bias",), same)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"vit.encoder.layer.{i}"
        yield from _norm(config, f"{ours}.attention_norm", f"{theirs}.layernorm_before")
        yield from _qkv(config, f"{ours}.attention.qkv",
                        tuple(f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")),
                        _separate(config), bias=True)
        yield from _linear(f"{ours}.attention.proj", hidden, hidden, f"{theirs}.attention.output.dense", bias=True)
        yield from _norm(config, f"{ours}.mlp_norm", f"{theirs}.layernorm_after")
        yield from _linear(f"{ours}.mlp.fc1", config.ffn, hidden, f"{theirs}.intermediate.dense", bias=True)
        yield from _linear(f"{ours}.mlp.fc2", hidden, config.ffn, f"{theirs}.output.dense", bias=True)
    yield from _norm(config, "final_norm", "vit.layernorm")
    yield from _linear("classifier", config.num_classes, hidden, "classifier", bias=True)


FAMILIES: dict[str, Callable[[ModelConfig], Iterator[Mapped]]] = {
    "gpt2": _gpt2, "llama": _llama, "megatron-bert": _megatron_bert, "vit": _vit}
