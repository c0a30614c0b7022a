"""Translates between a Hugging Face config.json and our settings, in both directions.

Every entry of a file is either translated, or must have the one value that means what we compute, or has nothing to do
with the computation. Anything else is rejected, so that no feature of a model is dropped silently.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.config import ModelConfig
from megatron_ltd.errors import CheckpointError

Values = Mapping[str, Any]

FAMILY_OF = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama", "megatron-bert": "megatron-bert",
             "vit": "vit"}
"""model_type -> how its weights are laid out."""

ARCHITECTURE = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                "megatron-bert": "MegatronBertForPreTraining", "vit": "ViTForImageClassification"}
"""model_type -> the class that opens an exported model."""

_LAYERS = {"num_hidden_layers": "num_layers", "hidden_size": "hidden_size",
           "num_attention_heads": "num_attention_heads"}
SIZES: dict[str, dict[str, str]] = {
    "gpt2": {"n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_inner": "ffn",
             "n_positions": "max_positions", "layer_norm_epsilon": "norm_epsilon"},
    "llama": {**_LAYERS, "num_key_value_heads": "query_groups", "head_dim": "head_dim", "intermediate_size": "ffn",
              "max_position_embeddings": "max_positions", "rms_norm_eps": "norm_epsilon"},
    "megatron-bert": {**_LAYERS, "intermediate_size": "ffn", "max_position_embeddings": "max_positions",
                      "layer_norm_eps": "norm_epsilon"},
    "vit": {**_LAYERS, "intermediate_size": "ffn", "image_size": "img_h", "patch_size": "patch_dim",
            "num_channels": "num_channels", "layer_norm_eps": "norm_epsilon"},
}
"""Family -> entry -> what it is of `ModelConfig`; in the order in which an export writes them."""

Default = int | float | Callable[[Values], int]
_GROUPS: dict[str, Default] = {"num_key_value_heads": lambda read: read["num_attention_heads"],
                               "head_dim": lambda read: max(1, read["hidden_size"] // read["num_attention_heads"]),
                               "rms_norm_eps": 1e-6}
DEFAULTS: dict[str, dict[str, Default]] = {
    "gpt2": {"n_inner": lambda read: 4 * read["hidden_size"], "layer_norm_epsilon": 1e-5},
    "llama": {**_GROUPS, "max_position_embeddings": 2048},
    "mistral": {**_GROUPS, "num_key_value_heads": 8},
    "qwen2": _GROUPS,
    "megatron-bert": {"layer_norm_eps": 1e-12},
    "vit": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
            "image_size": 224, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-12},
}
"""model_type -> entry -> its value where the file leaves it out."""

WITHOUT_MEANING = frozenset((
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path",
    "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id",
    "decoder_start_token_id", "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout", "summary_activation", "summary_first_dropout",
    "summary_proj_to_logits", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "n_ctx", "gradient_checkpointing", "max_window_layers", "problem_type", "id2label", "label2id", "return_dict",
    "output_attentions", "output_hidden_states", "torchscript", "attn_implementation", "_attn_implementation",
    "chunk_size_feed_forward", "use_return_dict", "finetuning_task", "return_dict_in_generate",
    "predict_special_tokens", "is_llama_config", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset"))
"""Training, generation and bookkeeping. Dropout is a setting of each run."""

REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "any": {"is_encoder_decoder": (False,), "add_cross_attention": (False,), "is_decoder": (False,),
            "tie_encoder_decoder": (False,), "cross_attention_hidden_size": (None,), "pruned_heads": (None, {})},
    "gpt2": {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "reorder_and_upcast_attn": (False,)},
    "llama": {"hidden_act": ("silu", "swish"), "pretraining_tp": (1,), "rope_interleaved": (False,),
              "partial_rotary_factor": (None, 1.0), "use_sliding_window": (False, None)},
    "megatron-bert": {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "type_vocab_size": (2,)},
    "vit": {"hidden_act": ("gelu",), "qkv_bias": (True,)},
}
"""Family -> entry -> values with which it means what we compute; where it is missing it has one of them."""

REMOTE_CODE = "auto_map"

_NOT_OF_THE_MODEL = {"seq_length", "max_position_embeddings", "make_vocab_size_divisible_by", "hidden_dropout",
                     "attention_dropout", "init_method_std"}


def family_of(config: Values, path: Path) -> str:
    """How the weights are laid out.

    Raises:
        CheckpointError: another kind of model.
    """
    if REMOTE_CODE in config:
        raise CheckpointError(f"{path}: {REMOTE_CODE} names Python code that comes with the model; no code is run. If "
                              f"the model is one of {', '.join(FAMILY_OF)} without it, remove the entry.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILY_OF:
        raise CheckpointError(f"{path}: model_type = {kind!r}; it must be one of {', '.join(FAMILY_OF)}, the supported "
                              "models.")
    return FAMILY_OF[kind]


def model_config(config: Values, path: Path) -> ModelConfig:
    """Our settings for a config.json.

    Raises:
        CheckpointError: with everything in it that is missing or unsupported.
    """
    family = family_of(config, path)
    reader = _Reader(config)
    defaults = DEFAULTS[config["model_type"]]
    read: dict[str, Any] = {}
    for name, ours in SIZES[family].items():
        default = defaults.get(name)
        value = default(read) if callable(default) else default
        read[ours] = reader.number(name, value) if ours == "norm_epsilon" else reader.size(name, value)
    read["ffn_hidden_size"] = read.pop("ffn")
    if family != "vit":
        read["seq_length"] = read["max_position_embeddings"] = read.pop("max_positions")
        read["vocab_size"] = reader.size("vocab_size")
        tied = reader.flag("tie_word_embeddings", family != "llama")
        read["untie_embeddings_and_output_weights"] = not tied
    if family == "gpt2":
        read["openai_gelu"] = _is_tanh_gelu(reader)
    elif family == "llama":
        read |= _llama(reader, groups=read.pop("query_groups"), head_dim=read.pop("head_dim"), read=read)
    elif family == "megatron-bert":
        read["family"] = "bert"
    else:
        read |= _vit(reader, image=read["img_h"], patch=read["patch_dim"])
    for name, allowed in {**REQUIRED["any"], **REQUIRED[family]}.items():
        reader.must_be(name, allowed)
    raise_problems(f"{path} describes a model that is not supported", [*reader.problems, *reader.unknown()])
    return ModelConfig(**read)


class _Reader:
    """Reads entries, and keeps account of which were read and of what is wrong with them."""

    def __init__(self, config: Values):
        self.config = config
        self.read: set[str] = set()
        self.problems: list[str] = []

    def any(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def size(self, name: str, default: Any = None) -> int:
        """A number of things, at least one."""
        value = self.any(name, default)
        fits = type(value) is int and value >= 1
        return value if fits else self.wrong(name, value, "must be a whole number of at least 1", 1)

    def number(self, name: str, default: Any) -> float:
        value = self.any(name, default)
        fits = type(value) in (int, float) and value > 0
        return float(value) if fits else self.wrong(name, value, "must be a number above 0", 1.0)

    def flag(self, name: str, default: bool) -> bool:
        value = self.any(name, default)
        return value if isinstance(value, bool) else self.wrong(name, value, "must be true or false", default)

    def must_be(self, name: str, allowed: tuple[Any, ...]) -> None:
        self.read.add(name)
        if name in self.config and self.config[name] not in allowed:
            self.wrong(name, self.config[name], f"only {allowed[0]!r} is supported")

    def wrong(self, name: str, value: Any, rule: str, instead: Any = None) -> Any:
        """Note a problem; returns a value to go on with, so that all problems are found."""
        self.problems.append(f"{name} = {value!r}"[:200] + f": {rule}")
        return instead

    def unknown(self) -> Iterator[str]:
        for name, value in self.config.items():
            if name not in self.read and name not in WITHOUT_MEANING and value is not None:
                yield (f"{name} = {value!r}"[:200] + ": not an entry that is known here. If it does not change what "
                       "the model computes, remove it")


def _is_tanh_gelu(reader: _Reader) -> bool:
    activations = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}
    activation = reader.any("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in activations:
        return bool(reader.wrong("activation_function", activation, f"must be one of {', '.join(activations)}", False))
    return activations[activation]


def _llama(reader: _Reader, groups: int, head_dim: int, read: Values) -> dict[str, Any]:
    heads = read["num_attention_heads"]
    if heads % groups:
        reader.wrong("num_key_value_heads", groups, f"must divide num_attention_heads = {heads}")
    _check_window(reader, read["max_position_embeddings"])
    grouped = groups != heads
    return {"kv_channels": head_dim if head_dim * heads != read["hidden_size"] else None,
            "group_query_attention": grouped, "num_query_groups": groups if grouped else None,
            "position_embedding_type": "rope", "rotary_base": _rotary_base(reader, 10000.0),
            "normalization": "RMSNorm", "swiglu": True, **_llama_biases(reader)}


def _llama_biases(reader: _Reader) -> dict[str, bool]:
    if reader.any("model_type") == "qwen2":
        return {"disable_bias_linear": True, "add_qkv_bias": True}
    attention, mlp = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    if attention != mlp:
        reader.problems.append(f"attention_bias = {attention} with mlp_bias = {mlp}: biases are supported in all "
                               "linear layers, in none, or (qwen2) in query, key and value alone")
    return {"disable_bias_linear": not mlp}


def _check_window(reader: _Reader, positions: int) -> None:
    """A sliding window is full attention as long as no position lies outside it."""
    window, layers = reader.any("sliding_window"), reader.any("layer_types", [])
    reaches_all = window is None or (type(window) is int and window >= positions)
    used = reader.any("model_type") != "qwen2" and reader.config.get("use_sliding_window") is not False
    if used and not reaches_all:
        reader.problems.append(f"sliding_window = {window} below max_position_embeddings = {positions}: attention "
                               f"within a window is not supported. Up to {window} positions it is full attention: "
                               f"with max_position_embeddings set to {window}, the model can be read")
    allowed = ["full_attention", "sliding_attention"] if reaches_all else ["full_attention"]
    if not isinstance(layers, list) or not all(layer in allowed for layer in layers):
        reader.wrong("layer_types", layers, "only full_attention is supported")


def _rotary_base(reader: _Reader, default: float) -> int:
    """The base of plain rotary positions, from either of the ways it is written."""
    base = reader.any("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        entry = reader.any(name)
        if entry is None:
            continue
        if not isinstance(entry, dict):
            reader.wrong(name, entry, "must be a table")
            continue
        kind = entry.get("rope_type", entry.get("type", "default"))
        others = {key: value for key, value in entry.items()
                  if key not in ("rope_type", "type", "rope_theta") and value is not None
                  and not (key == "partial_rotary_factor" and value == 1.0)}
        if kind != "default" or others:
            reader.wrong(name, entry, "only plain rotary positions (rope_type default) are supported")
        base = entry.get("rope_theta", base)
    base = default if base is None else base
    if type(base) not in (int, float) or base % 1 or base <= 1:
        return int(reader.wrong("rope_theta", base, "must be a whole number above 1", 10000))
    return int(base)


def _vit(reader: _Reader, image: int, patch: int) -> dict[str, Any]:
    for name in ("encoder_stride", "pooler_act", "pooler_output_size"):  # of other heads than the classifier
        reader.any(name)
    names = reader.any("id2label")
    if image % patch:
        reader.wrong("image_size", image, f"must be divisible by patch_size = {patch}")
    return {"family": "vit", "img_w": image, "seq_length": (image // patch) ** 2 + 1,
            "num_classes": len(names) if isinstance(names, dict) and names else reader.size("num_labels", 2)}


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
    kind, needs = _kind(config)
    raise_problems("this model cannot be written as a Hugging Face model",
                   [f"{rule} for {kind}" for rule, holds in needs.items() if not holds])
    family = FAMILY_OF[kind]
    entries = {name: getattr(config, ours) for name, ours in SIZES[family].items()}
    vocabulary = {} if kind == "vit" else {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied}
    return {"architectures": [ARCHITECTURE[kind]], "model_type": kind, **entries, **_other_entries(config, kind),
            **vocabulary, "initializer_range": config.init_method_std}


def _kind(config: ModelConfig) -> tuple[str, dict[str, bool]]:
    """The nearest model_type, and what must hold for it to compute the same."""
    classic = {
        "--position-embedding-type must be learned_absolute": config.position_embedding_type == "learned_absolute",
        "--normalization must be LayerNorm": config.normalization == "LayerNorm",
        "--swiglu must be off": not config.swiglu,
        "--disable-bias-linear must be off": not config.disable_bias_linear,
        "--group-query-attention must be off": config.query_groups == config.num_attention_heads,
        "--kv-channels must be hidden size / heads":
            config.head_dim * config.num_attention_heads == config.hidden_size,
    }
    exact_gelu = {"--openai-gelu must be off": not config.openai_gelu}
    if config.family == "vit":
        return "vit", {**classic, **exact_gelu, "--img-h and --img-w must be equal": config.img_h == config.img_w}
    if config.family == "bert":
        return "megatron-bert", {**classic, **exact_gelu,
                                 "--bert-no-binary-head must be off": not config.bert_no_binary_head}
    if not config.swiglu and config.position_embedding_type != "rope":
        return "gpt2", classic
    return "qwen2" if config.disable_bias_linear and config.add_qkv_bias else "llama", {
        "--position-embedding-type must be rope": config.position_embedding_type == "rope",
        "--rotary-percent must be 1.0": config.rotary_percent == 1.0,
        "--normalization must be RMSNorm": config.normalization == "RMSNorm",
        "--swiglu must be on": config.swiglu,
    }


def _other_entries(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What is no size: activations, dropout, biases and labels."""
    if kind == "gpt2":
        return {"activation_function": "gelu_new" if config.openai_gelu else "gelu",
                "embd_pdrop": config.hidden_dropout, "resid_pdrop": config.hidden_dropout,
                "attn_pdrop": config.attention_dropout}
    if FAMILY_OF[kind] == "llama":
        biases = {name: not config.disable_bias_linear for name in ("attention_bias", "mlp_bias") if kind == "llama"}
        return {"hidden_act": "silu", "rope_theta": float(config.rotary_base),
                "attention_dropout": config.attention_dropout, **biases}
    dropout = {"hidden_dropout_prob": config.hidden_dropout, "attention_probs_dropout_prob": config.attention_dropout}
    if kind == "megatron-bert":
        return {"hidden_act": "gelu", "type_vocab_size": 2, **dropout}
    assert config.num_classes is not None
    labels = [f"LABEL_{number}" for number in range(config.num_classes)]
    return {"hidden_act": "gelu", "qkv_bias": True, **dropout,
            "id2label": {str(number): name for number, name in enumerate(labels)},
            "label2id": {name: number for number, name in enumerate(labels)}}
