"""From a Hugging Face config.json to our settings. What we do not compute is refused, never left out.

Every entry of the file is either translated, or must have the one value that means what we compute, or has nothing to
do with the computation; an entry that is none of these is refused too.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.config import ModelConfig
from megatron_ltd.errors import CheckpointError

Values = Mapping[str, Any]

FAMILY_OF = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama", "megatron-bert": "megatron-bert",
             "vit": "vit"}
"""model_type -> how its weights are laid out."""

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
        raise CheckpointError(f"{path}: model_type = {kind!r}; it must be one of {', '.join(FAMILY_OF)}, which are the "
                              "models computed here.")
    return FAMILY_OF[kind]


def model_config(config: Values, path: Path) -> ModelConfig:
    """Our settings for a config.json.

    Raises:
        CheckpointError: with everything in it that is missing, or that we do not compute.
    """
    family = family_of(config, path)
    reader = _Reader(config)
    settings = {"gpt2": _gpt2, "llama": _llama, "megatron-bert": _megatron_bert, "vit": _vit}[family](reader)
    for name, allowed in {**REQUIRED["any"], **REQUIRED[family]}.items():
        reader.must_be(name, allowed)
    raise_problems(f"{path} describes a model that is not computed here", [*reader.problems, *reader.unknown()])
    return ModelConfig(**settings)


class _Reader:
    """Reads entries, and keeps account of which were read and of what is wrong with them."""

    def __init__(self, config: Values):
        self.config = config
        self.read: set[str] = set()
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A number of things, at least one."""
        value = self.any(name)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            self.problems.append(f"{name} = {value!r}: must be a whole number of at least 1")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        value = self.any(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            self.problems.append(f"{name} = {value!r}: must be a number above 0")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.any(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.problems.append(f"{name} = {value!r}: must be true or false")
            return default
        return value

    def any(self, name: str) -> Any:
        self.read.add(name)
        return self.config.get(name)

    def must_be(self, name: str, allowed: tuple[Any, ...]) -> None:
        if name in self.config and self.any(name) not in allowed:
            self.problems.append(f"{name} = {self.config[name]!r}: only {allowed[0]!r} is computed here")

    def unknown(self) -> Iterator[str]:
        for name, value in self.config.items():
            if name not in self.read and name not in WITHOUT_MEANING and value is not None:
                yield (f"{name} = {value!r}"[:200] + ": not an entry that is known here. If it does not change what "
                       "the model computes, remove it")


def _gpt2(reader: _Reader) -> dict[str, Any]:
    activations = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}
    activation = reader.any("activation_function") or "gelu_new"
    if activation not in activations:
        reader.problems.append(f"activation_function = {activation!r}: must be one of {', '.join(activations)}")
    hidden, positions = reader.size("n_embd"), reader.size("n_positions")
    return {
        "num_layers": reader.size("n_layer"), "hidden_size": hidden, "num_attention_heads": reader.size("n_head"),
        "ffn_hidden_size": reader.size("n_inner", 4 * hidden), "seq_length": positions,
        "max_position_embeddings": positions, "vocab_size": reader.size("vocab_size"),
        "norm_epsilon": reader.number("layer_norm_epsilon", 1e-5), "openai_gelu": activations.get(activation, False),
        "untie_embeddings_and_output_weights": not reader.flag("tie_word_embeddings", True),
    }


def _llama(reader: _Reader) -> dict[str, Any]:
    kind = reader.any("model_type")
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    # Mistral's default is eight groups; what the others have is as many as heads.
    groups = reader.size("num_key_value_heads", 8 if kind == "mistral" else heads)
    positions = reader.size("max_position_embeddings", 2048 if kind == "llama" else None)
    head_dim = reader.size("head_dim", max(1, hidden // heads))
    if heads % groups:
        reader.problems.append(f"num_key_value_heads = {groups}: must divide num_attention_heads = {heads}")
    _window(reader, positions)
    return {
        "num_layers": reader.size("num_hidden_layers"), "hidden_size": hidden, "num_attention_heads": heads,
        "ffn_hidden_size": reader.size("intermediate_size"),
        "kv_channels": head_dim if head_dim * heads != hidden else None,
        "group_query_attention": groups != heads, "num_query_groups": groups if groups != heads else None,
        "seq_length": positions, "max_position_embeddings": positions, "vocab_size": reader.size("vocab_size"),
        "position_embedding_type": "rope", "rotary_base": _rotary_base(reader, 10000.0),
        "normalization": "RMSNorm", "norm_epsilon": reader.number("rms_norm_eps", 1e-6), "swiglu": True,
        "untie_embeddings_and_output_weights": not reader.flag("tie_word_embeddings", False),
        **_llama_biases(reader, str(kind)),
    }


def _llama_biases(reader: _Reader, kind: str) -> dict[str, bool]:
    if kind == "qwen2":
        return {"disable_bias_linear": True, "add_qkv_bias": True}
    attention, mlp = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    if attention != mlp:
        reader.problems.append(f"attention_bias = {attention} with mlp_bias = {mlp}: biases in all linear layers or in "
                               "none are computed here, or (qwen2) in query, key and value alone")
    return {"disable_bias_linear": not mlp}


def _window(reader: _Reader, positions: int) -> None:
    """A sliding window is full attention as long as no position lies outside it."""
    window, layers = reader.any("sliding_window"), reader.any("layer_types")
    used = reader.config.get("use_sliding_window") is not False if "use_sliding_window" in reader.config else True
    if reader.config.get("model_type") == "qwen2" and not reader.config.get("use_sliding_window"):
        used = False
    if used and window is not None and (type(window) is not int or window < positions):
        reader.problems.append(f"sliding_window = {window} below max_position_embeddings = {positions}: attention "
                               f"within a window is not computed here. Up to {window} positions it is full attention: "
                               f"with max_position_embeddings set to {window}, the model can be read")
    if layers is not None and (not isinstance(layers, list) or not set(layers) <= {"full_attention"}):
        windowed = isinstance(layers, list) and set(layers) <= {"full_attention", "sliding_attention"}
        if not (windowed and (window is None or (type(window) is int and window >= positions))):
            reader.problems.append(f"layer_types = {layers!r}"[:120] + ": only full_attention is computed here")


def _rotary_base(reader: _Reader, default: float) -> int:
    """The base of plain rotary positions, from either of the ways it is written."""
    base = reader.any("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        entry = reader.any(name)
        if entry is None:
            continue
        if not isinstance(entry, dict):
            reader.problems.append(f"{name} = {entry!r}: must be a table")
            continue
        kind = entry.get("rope_type", entry.get("type", "default"))
        others = {key: value for key, value in entry.items()
                  if key not in ("rope_type", "type", "rope_theta") and value is not None
                  and not (key == "partial_rotary_factor" and value == 1.0)}
        if kind != "default" or others:
            reader.problems.append(f"{name} = {entry!r}"[:200] + ": only plain rotary positions (rope_type default) "
                                   "are computed here")
        base = entry.get("rope_theta", base)
    base = default if base is None else base
    if isinstance(base, bool) or not isinstance(base, int | float) or base != int(base) or base <= 1:
        reader.problems.append(f"rope_theta = {base!r}: must be a whole number above 1")
        return 10000
    return int(base)


def _megatron_bert(reader: _Reader) -> dict[str, Any]:
    positions = reader.size("max_position_embeddings")
    reader.any("type_vocab_size")
    return {
        "family": "bert", "num_layers": reader.size("num_hidden_layers"), "hidden_size": reader.size("hidden_size"),
        "num_attention_heads": reader.size("num_attention_heads"),
        "ffn_hidden_size": reader.size("intermediate_size"), "seq_length": positions,
        "max_position_embeddings": positions, "vocab_size": reader.size("vocab_size"),
        "norm_epsilon": reader.number("layer_norm_eps", 1e-12),
        "untie_embeddings_and_output_weights": not reader.flag("tie_word_embeddings", True),
    }


def _vit(reader: _Reader) -> dict[str, Any]:
    for name in ("encoder_stride", "pooler_act", "pooler_output_size"):  # of other heads than the classifier
        reader.any(name)
    image, patch = reader.size("image_size", 224), reader.size("patch_size", 16)
    names = reader.any("id2label")
    if image % patch:
        reader.problems.append(f"image_size = {image}: must be divisible by patch_size = {patch}")
    return {
        "family": "vit", "num_layers": reader.size("num_hidden_layers", 12),
        "hidden_size": reader.size("hidden_size", 768), "num_attention_heads": reader.size("num_attention_heads", 12),
        "ffn_hidden_size": reader.size("intermediate_size", 3072), "img_h": image, "img_w": image, "patch_dim": patch,
        "num_channels": reader.size("num_channels", 3), "seq_length": (image // patch) ** 2 + 1,
        "num_classes": len(names) if isinstance(names, dict) and names else reader.size("num_labels", 2),
        "norm_epsilon": reader.number("layer_norm_eps", 1e-12),
    }
