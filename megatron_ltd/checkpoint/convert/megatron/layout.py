"""How Megatron-LM's classic checkpoints name and cut a model, and how the cuts go together again.

A rank (tensor t, pipeline p) holds the layers of its stage, counted from 0, and of each tensor its part:

    rows cut        word embedding, output layer, query/key/value, dense_h_to_4h, the vocabulary's bias
    columns cut     attention.dense and dense_4h_to_h
    whole           everything else; the first part counts

Rows of the query/key/value projection are, by version of the checkpoint: 0 all queries, all keys, all values of a
rank; 1.0 interleaved by channel; from 2.0 on query, key and value of each head (and of each group of heads). Ours is
the last. With SwiGLU a rank's dense_h_to_4h holds its gate rows and then its up rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_ltd.config import ModelConfig
from megatron_ltd.errors import CheckpointError

Tensors = dict[str, torch.Tensor]

_LAYER_NAMES = {"attention_norm": "input_layernorm", "attention.qkv": "self_attention.query_key_value",
                "attention.proj": "self_attention.dense", "mlp_norm": "post_attention_layernorm",
                "mlp.fc1": "mlp.dense_h_to_4h", "mlp.fc2": "mlp.dense_4h_to_h"}
_ROWS_CUT = ("embedding.word.weight", "head.weight", "lm_head.bias", "attention.qkv.weight", "attention.qkv.bias",
             "mlp.fc1.weight", "mlp.fc1.bias")
_COLUMNS_CUT = ("attention.proj.weight", "mlp.fc2.weight")


def flattened(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dictionaries by dotted names."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def our_names(state: Mapping[str, Any], first_layer: int) -> Tensors:
    """The tensors of one rank's stage under our names.

    Args:
        state: `model` of the file.
        first_layer: global number of the stage's first layer.

    Raises:
        CheckpointError: a tensor of another kind of model.
    """
    found: Tensors = {}
    unknown = []
    for theirs, tensor in flattened(state):
        # Older versions say transformer for encoder, and attention for self_attention.
        name = theirs.replace("language_model.transformer.", "language_model.encoder.")
        name = name.replace(".attention.", ".self_attention.")
        ours = _our_name(name, first_layer)
        if ours is None:
            unknown.append(theirs)
        elif ours:
            found[ours] = tensor
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors are none of the classic GPT's or BERT's, such as {unknown[0]}; "
                              "models of megatron.core are saved under other names, and are not read")
    return found


def _our_name(name: str, first_layer: int) -> str | None:
    """Empty for what is not needed, None for what is not known."""
    if name.endswith("_extra_state") or "word_embeddings_for_head" in name or "rotary_pos_emb" in name:
        return ""  # the copy of a tied embedding, and what follows from the settings
    fixed = {"language_model.embedding.word_embeddings.weight": "embedding.word.weight",
             "language_model.embedding.position_embeddings.weight": "embedding.position.weight",
             "language_model.embedding.tokentype_embeddings.weight": "embedding.token_type.weight",
             "language_model.output_layer.weight": "head.weight", "lm_head.bias": "lm_head.bias"}
    if name in fixed:
        return fixed[name]
    module, _, kind = name.rpartition(".")
    modules = {"language_model.encoder.final_layernorm": "final_norm", "lm_head.dense": "lm_head.dense",
               "lm_head.layernorm": "lm_head.norm", "language_model.pooler.dense": "pooler",
               "binary_head": "binary_head"}
    if module in modules:
        return f"{modules[module]}.{kind}"
    words = name.removeprefix("language_model.encoder.layers.").split(".")
    if not name.startswith("language_model.encoder.layers.") or not words[0].isdigit():
        return None
    inner = ".".join(words[1:-1])
    for ours, theirs in _LAYER_NAMES.items():
        if inner == theirs:
            return f"layers.{first_layer + int(words[0])}.{ours}.{words[-1]}"
    return None


def joined(name: str, parts: Sequence[torch.Tensor], config: ModelConfig, version: float) -> Tensors:
    """One tensor, or with SwiGLU the two of a projection, from the parts of the tensor-parallel ranks.

    Args:
        name: ours.
        version: of the checkpoint.
    """
    kind = name.split(".", 2)[2] if name.startswith("layers.") else name
    if kind.startswith("attention.qkv."):
        parts = [_grouped_qkv(part, config, len(parts), version) for part in parts]
    if kind.startswith("mlp.fc1.") and config.swiglu:
        halves = [part.chunk(2) for part in parts]
        return {name.replace("fc1", ours): torch.cat([half[place] for half in halves])
                for place, ours in enumerate(("gate", "up"))}
    if kind in _ROWS_CUT:
        return {name: torch.cat(list(parts))}
    if kind in _COLUMNS_CUT:
        return {name: torch.cat(list(parts), dim=1)}
    return {name: parts[0]}


def _grouped_qkv(part: torch.Tensor, config: ModelConfig, ranks: int, version: float) -> torch.Tensor:
    """A rank's rows in the order of version 2.0."""
    if version >= 2.0 or config.group_query_attention:  # groups came later than the other orders
        return part
    heads, width, rest = config.num_attention_heads // ranks, config.head_dim, part.shape[1:]
    if version >= 1.0:
        return part.reshape(heads, width, 3, *rest).transpose(1, 2).reshape(part.shape)
    return part.reshape(3, heads, width, *rest).transpose(0, 1).reshape(part.shape)
