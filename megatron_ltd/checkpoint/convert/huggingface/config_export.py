"""From our settings to a Hugging Face config.json, where there is a model there that computes the same."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from megatron_ltd.config import ModelConfig
from megatron_ltd.errors import CheckpointError

ARCHITECTURE = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                "qwen2": "Qwen2ForCausalLM", "megatron-bert": "MegatronBertForPreTraining",
                "vit": "ViTForImageClassification"}
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_NOT_OF_THE_MODEL = {"seq_length", "max_position_embeddings", "make_vocab_size_divisible_by", "hidden_dropout",
                     "attention_dropout", "init_method_std"}


def computes_the_same(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether weights of one are weights of the other; lengths and padding aside."""

    def essence(config: ModelConfig) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(config).items() if name not in _NOT_OF_THE_MODEL}
        derived = {"ffn_hidden_size": config.ffn, "kv_channels": config.head_dim,
                   "num_query_groups": config.query_groups, "group_query_attention": None,
                   "max_positions": config.max_positions}
        return settings | derived

    return essence(one) == essence(other)


def describe(config: ModelConfig) -> dict[str, Any]:
    """A config.json without token ids and dtype.

    Raises:
        CheckpointError: no model there computes the same; says which settings stand in the way.
    """
    kind, problems = _kind(config)
    if problems:
        raise CheckpointError("this model cannot be written as a Hugging Face model:\n  " + "\n  ".join(problems))
    if kind == "vit":
        return {"architectures": [ARCHITECTURE[kind]], "model_type": kind, **_vit(config),
                "initializer_range": config.init_method_std}
    entries = {"gpt2": _gpt2, "llama": _llama, "qwen2": _llama, "megatron-bert": _megatron_bert}[kind](config)
    return {"architectures": [ARCHITECTURE[kind]], "model_type": kind, **entries,
            "vocab_size": config.vocab_size, "tie_word_embeddings": config.tied,
            "initializer_range": config.init_method_std}


def _kind(config: ModelConfig) -> tuple[str, list[str]]:
    """The nearest model_type, and what it would compute otherwise."""
    Rule = tuple[Callable[[ModelConfig], bool], str]
    gpt2: list[Rule] = [
        (lambda c: c.position_embedding_type == "learned_absolute",
         "--position-embedding-type must be learned_absolute"),
        (lambda c: c.normalization == "LayerNorm", "--normalization must be LayerNorm"),
        (lambda c: not c.swiglu, "--swiglu must be off"),
        (lambda c: not c.disable_bias_linear, "--disable-bias-linear must be off"),
        (lambda c: c.query_groups == c.num_attention_heads, "--group-query-attention must be off"),
        (lambda c: c.head_dim * c.num_attention_heads == c.hidden_size, "--kv-channels must be hidden size / heads"),
    ]
    bert: list[Rule] = [
        *gpt2, (lambda c: not c.openai_gelu, "--openai-gelu must be off"),
        (lambda c: not c.bert_no_binary_head, "--bert-no-binary-head must be off")]
    llama: list[Rule] = [
        (lambda c: c.position_embedding_type == "rope", "--position-embedding-type must be rope"),
        (lambda c: c.rotary_percent == 1.0, "--rotary-percent must be 1.0"),
        (lambda c: c.normalization == "RMSNorm", "--normalization must be RMSNorm"),
        (lambda c: c.swiglu, "--swiglu must be on"),
    ]
    if config.family == "vit":
        kind, rules = "vit", [*gpt2, (lambda c: not c.openai_gelu, "--openai-gelu must be off"),
                              (lambda c: c.img_h == c.img_w, "--img-h and --img-w must be equal")]
    elif config.family == "bert":
        kind, rules = "megatron-bert", bert
    elif config.swiglu or config.position_embedding_type == "rope":
        kind, rules = "qwen2" if config.disable_bias_linear and config.add_qkv_bias else "llama", llama
    else:
        kind, rules = "gpt2", gpt2
    return kind, [f"{text} for {kind}" for holds, text in rules if not holds(config)]


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {"n_layer": config.num_layers, "n_embd": config.hidden_size, "n_head": config.num_attention_heads,
            "n_inner": config.ffn, "n_positions": config.max_positions, "layer_norm_epsilon": config.norm_epsilon,
            "activation_function": "gelu_new" if config.openai_gelu else "gelu",
            "embd_pdrop": config.hidden_dropout, "resid_pdrop": config.hidden_dropout,
            "attn_pdrop": config.attention_dropout}


def _llama(config: ModelConfig) -> dict[str, Any]:
    biases = {} if config.add_qkv_bias and config.disable_bias_linear else {
        "attention_bias": not config.disable_bias_linear, "mlp_bias": not config.disable_bias_linear}
    return {"num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.query_groups,
            "head_dim": config.head_dim, "intermediate_size": config.ffn,
            "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm_epsilon, "hidden_act": "silu",
            "rope_theta": float(config.rotary_base), "attention_dropout": config.attention_dropout, **biases}


def _megatron_bert(config: ModelConfig) -> dict[str, Any]:
    return {"num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads, "intermediate_size": config.ffn,
            "max_position_embeddings": config.max_positions, "layer_norm_eps": config.norm_epsilon,
            "hidden_act": "gelu", "type_vocab_size": 2, "hidden_dropout_prob": config.hidden_dropout,
            "attention_probs_dropout_prob": config.attention_dropout}


def _vit(config: ModelConfig) -> dict[str, Any]:
    assert config.num_classes is not None
    labels = [f"LABEL_{number}" for number in range(config.num_classes)]
    return {"num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads, "intermediate_size": config.ffn,
            "image_size": config.img_h, "patch_size": config.patch_dim, "num_channels": config.num_channels,
            "layer_norm_eps": config.norm_epsilon, "hidden_act": "gelu", "qkv_bias": True,
            "hidden_dropout_prob": config.hidden_dropout, "attention_probs_dropout_prob": config.attention_dropout,
            "id2label": {str(number): name for number, name in enumerate(labels)},
            "label2id": {name: number for number, name in enumerate(labels)}}
