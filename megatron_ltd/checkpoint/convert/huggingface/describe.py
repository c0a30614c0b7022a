"""Writes our settings as a Hugging Face config.json, and says whether two models compute the same."""

from dataclasses import asdict
from typing import Any

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.convert.huggingface.decoder import decoder_entries, decoder_kind
from megatron_ltd.checkpoint.convert.huggingface.families import ARCHITECTURE, FAMILY_OF, SIZES
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.rope_scaling import rope_scaling

_NOT_OF_THE_MODEL = {"seq_length", "max_position_embeddings", "make_vocab_size_divisible_by", "hidden_dropout",
                     "attention_dropout", "init_method_std", "scaled_init"}
_SEVERAL_SPELLINGS = {"use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "rope_scaling",
                      "no_rope_freq", "window_size", "window_attn_skip_freq", "disable_bias_linear", "add_qkv_bias",
                      "add_proj_bias", "add_mlp_bias", "group_query_attention"}
"""Settings of which different values may mean the same; what they mean is compared instead."""


def computes_the_same(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether weights of one are weights of the other; lengths and padding aside."""

    def essence(config: ModelConfig) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(config).items()
                    if name not in _NOT_OF_THE_MODEL | _SEVERAL_SPELLINGS}
        layers = range(config.num_layers)
        derived = {"ffn_hidden_size": config.ffn, "kv_channels": config.head_dim,
                   "num_query_groups": config.query_groups, "max_positions": config.max_positions,
                   "scaling": rope_scaling(config), "rotated": [config.is_rotated(layer) for layer in layers],
                   "windows": [config.window_size if config.is_windowed(layer) else None for layer in layers],
                   "biases": (config.qkv_bias, config.proj_bias, config.mlp_bias)}
        return settings | derived

    return essence(one) == essence(other)


def describe(config: ModelConfig) -> dict[str, Any]:
    """A config.json without token ids and dtype.

    Raises:
        CheckpointError: no model there computes the same; says which settings stand in the way.
    """
    kind, needs = _kind(config)
    routed = [] if config.mixture_of_depths_capacity is None else [
        f"--mixture-of-depths-capacity = {config.mixture_of_depths_capacity}: no model there has routers that choose a "
        "layer's tokens; evaluate it here, or train without it"]
    tables = [] if config.ngram_rows is None else [
        f"--ngram-rows = {config.ngram_rows}: no model there looks up runs of tokens; evaluate it here, or train "
        "without it"]
    convolutions = [] if config.qkv_conv_kernel is None else [
        f"--qkv-conv-kernel = {config.qkv_conv_kernel}: no model there convolves queries, keys and values; evaluate it "
        "here, or train without it"]
    missing = [f"{rule} for {kind}" for rule, holds in needs.items() if not holds]
    raise_problems("this model cannot be written as a Hugging Face model", routed + tables + convolutions + missing)
    family = FAMILY_OF[kind]
    entries = {name: getattr(config, ours) for name, ours in SIZES[family].items()}
    vocabulary = {} if kind == "vit" else {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied}
    return {"architectures": [ARCHITECTURE[kind]], "model_type": kind, **entries, **_other_entries(config, kind),
            **vocabulary, "initializer_range": config.init_method_std}


def _kind(config: ModelConfig) -> tuple[str, dict[str, bool]]:
    """The nearest model_type, and what must hold for it to compute the same."""
    is_bloom = config.family == "gpt" and (config.position_embedding_type == "alibi" or config.embed_layernorm)
    positions = "alibi" if is_bloom else "learned_absolute"
    classic = {
        f"--position-embedding-type must be {positions}": config.position_embedding_type == positions,
        f"--embed-layernorm must be {'on' if is_bloom else 'off'}": config.embed_layernorm == is_bloom,
        "--normalization must be LayerNorm": config.normalization == "LayerNorm",
        "--swiglu must be off": not config.swiglu,
        "--disable-bias-linear must be off": config.qkv_bias and config.proj_bias and config.mlp_bias,
        "--norm-placement must be before": config.norm_placement == "before",
        "--qk-layernorm must be off": not config.qk_layernorm,
        "--window-size must be left out": config.window_size is None,
        "--group-query-attention must be off": config.query_groups == config.num_attention_heads,
        "--kv-channels must be hidden size / heads":
            config.head_dim * config.num_attention_heads == config.hidden_size,
    }
    exact_gelu = {"--openai-gelu must be off": not config.openai_gelu}
    if config.family == "vit":
        return "vit", {**classic, **exact_gelu, "--img-h and --img-w must be equal": config.img_h == config.img_w}
    if config.family == "bert":
        return "megatron-bert", {**classic, **exact_gelu,
                                 "--bert-no-binary-head must be off": config.has_binary_head}
    if is_bloom:
        return "bloom", {**classic, "--openai-gelu must be on": config.openai_gelu,
                         "--ffn-hidden-size must be 4 x hidden size": config.ffn == 4 * config.hidden_size}
    if not config.swiglu and config.position_embedding_type != "rope":
        return "gpt2", classic
    return decoder_kind(config)


def _other_entries(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What is no size: activations, dropout, biases and labels."""
    if kind == "gpt2":
        return {"activation_function": "gelu_new" if config.openai_gelu else "gelu",
                "embd_pdrop": config.hidden_dropout, "resid_pdrop": config.hidden_dropout,
                "attn_pdrop": config.attention_dropout}
    if kind == "bloom":
        return {"hidden_dropout": config.hidden_dropout, "attention_dropout": config.attention_dropout,
                "pad_token_id": None}
    if FAMILY_OF[kind] in ("llama", "olmo2"):
        return decoder_entries(config, kind)
    dropout = {"hidden_dropout_prob": config.hidden_dropout, "attention_probs_dropout_prob": config.attention_dropout}
    if kind == "megatron-bert":
        return {"hidden_act": "gelu", "type_vocab_size": 2, **dropout}
    assert config.num_classes is not None
    labels = [f"LABEL_{number}" for number in range(config.num_classes)]
    return {"hidden_act": "gelu", "qkv_bias": True, **dropout,
            "id2label": {str(number): name for number, name in enumerate(labels)},
            "label2id": {name: number for number, name in enumerate(labels)}}
