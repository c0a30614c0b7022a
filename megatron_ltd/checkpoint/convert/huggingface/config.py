"""Reads a Hugging Face config.json as our settings; `describe.py` is the way back.

Every entry that a class of the family computes with is translated, or must have the one value that means what we
compute. One that no class reads cannot change what the model computes: it is noted. Which entries a class reads is held
against the installed `transformers` by a test.
"""

from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.convert.huggingface.decoder import decoder_settings
from megatron_ltd.checkpoint.convert.huggingface.families import (
    ALIASES,
    DEFAULTS,
    FAMILY_OF,
    OTHERS,
    REMOTE_CODE,
    REQUIRED,
    SIZES,
    WITHOUT_MEANING,
)
from megatron_ltd.checkpoint.convert.huggingface.reader import Reader, Values
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.errors import CheckpointError


def family_of(config: Values, path: Path) -> str:
    """How the weights are laid out.

    Raises:
        CheckpointError: another kind of model.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILY_OF:
        why = f", since {OTHERS[kind]}" if isinstance(kind, str) and kind in OTHERS else ""
        raise CheckpointError(f"{path}: model_type = {kind!r} is not supported{why}; it must be one of "
                              f"{', '.join(FAMILY_OF)}")
    if REMOTE_CODE in config:
        raise CheckpointError(f"{path}: {REMOTE_CODE} names Python code that comes with the model; no code is run. If "
                              f"the model is a {kind} without it, remove the entry.")
    return FAMILY_OF[kind]


def model_config(config: Values, path: Path) -> ModelConfig:
    """Our settings for a config.json.

    Raises:
        CheckpointError: with everything in it that is missing or unsupported.
    """
    return _read(config, path)[0]


def unread_entries(config: Values, path: Path) -> list[str]:
    """The entries of a supported model that no class of its family reads."""
    known = _read(config, path)[1].read | WITHOUT_MEANING
    return [name for name in config if name not in known]


def _read(config: Values, path: Path) -> tuple[ModelConfig, Reader]:
    family = family_of(config, path)
    kind = config["model_type"]
    aliases = ALIASES.get(kind, {})
    reader = Reader({first: config[second] for second, first in aliases.items() if second in config} | dict(config))
    reader.must_agree(aliases)
    read: dict[str, Any] = {}
    for name, ours in SIZES[family].items():
        read[ours] = reader.number(name, read) if ours == "norm_epsilon" else reader.size(name, read)
    read["ffn_hidden_size"] = read.pop("ffn", None)
    if family != "vit":
        read["seq_length"] = read["max_position_embeddings"] = read.pop("max_positions")
        read["vocab_size"] = reader.size("vocab_size", read)
        tied = reader.flag("tie_word_embeddings", DEFAULTS[kind]["tie_word_embeddings"])
        read["untie_embeddings_and_output_weights"] = not tied
    if family == "gpt2":
        reader.must_agree({"n_ctx": "n_positions", "hidden_size": "n_embd", "num_hidden_layers": "n_layer",
                           "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"})
        read["openai_gelu"] = _is_tanh_gelu(reader)
    elif family == "bloom":
        read |= {"position_embedding_type": "alibi", "embed_layernorm": True, "openai_gelu": True}
    elif family == "megatron-bert":
        read["family"] = "bert"
    elif family == "vit":
        read |= _vit(reader, read)
    else:
        read |= decoder_settings(reader, kind, read)
        del read["query_groups"], read["head_dim"]
    for name, allowed in {**REQUIRED["any"], **REQUIRED[family]}.items():
        reader.must_be(name, allowed)
    raise_problems(f"{path} describes a model that is not supported", [*reader.problems, *reader.foreign()])
    return ModelConfig(**read), reader


def _is_tanh_gelu(reader: Reader) -> bool:
    activations = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}
    activation = reader.any("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in activations:
        return bool(reader.wrong("activation_function", activation, f"must be one of {', '.join(activations)}", False))
    return activations[activation]


def _vit(reader: Reader, read: Values) -> dict[str, Any]:
    image, patch = read["img_h"], read["patch_dim"]
    for name in ("encoder_stride", "pooler_act", "pooler_output_size"):  # of other heads than the classifier
        reader.any(name)
    names = reader.any("id2label")
    if image % patch:
        reader.wrong("image_size", image, f"must be divisible by patch_size = {patch}")
    classes = len(names) if isinstance(names, dict) and names else reader.size("num_labels", read)
    return {"family": "vit", "img_w": image, "seq_length": (image // patch) ** 2 + 1, "num_classes": classes}
