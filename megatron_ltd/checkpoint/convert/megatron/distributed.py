"""megatron-core's distributed checkpoints (`--ckpt-format torch_dist`), already opened, as our weights and back.

They hold whole tensors in pieces of any layout. Layers that are alike are stacked: the first dim of
`decoder.layers.mlp.linear_fc1.weight` is the layer. Rows of the query/key/value projection are in our order, and with
SwiGLU all gate rows stand before all up rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.convert.megatron.args import State, model_config
from megatron_ltd.checkpoint.convert.megatron.importing import fitted
from megatron_ltd.checkpoint.whole_tensors import write_weights
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.model.arithmetic.shapes import VOCABULARY, parameter_shapes

_NAMES = {
    "embedding.word.weight": "embedding.word_embeddings.weight",
    "embedding.position.weight": "embedding.position_embeddings.weight",
    "embedding.token_type.weight": "embedding.tokentype_embeddings.weight",
    "head.weight": "output_layer.weight",
    "lm_head.bias": "output_layer.bias",
}
_MODULES = {"lm_head.dense": "lm_head.dense", "lm_head.norm": "lm_head.layer_norm", "pooler": "pooler.dense",
            "binary_head": "binary_head"}
_LAYER_MODULES = {
    "attention_norm": ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    "attention.qkv": ("self_attention.linear_qkv.",),
    "attention.query_norm": ("self_attention.q_layernorm.",),
    "attention.key_norm": ("self_attention.k_layernorm.",),
    "attention.proj": ("self_attention.linear_proj.",),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    "mlp.fc1": ("mlp.linear_fc1.",),
    "mlp.gate": ("mlp.linear_fc1.",),
    "mlp.up": ("mlp.linear_fc1.",),
    "mlp.fc2": ("mlp.linear_fc2.",),
}
"""Our module of a layer -> theirs, before `weight` or `bias`: with the norm in the projection after it, and apart."""
_WITH_STATE = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""Modules whose further state, which is empty without fp8, megatron-core asks for."""
_HALF = {"mlp.gate": 0, "mlp.up": 1}
_OF_THE_MODEL = ("embedding.", "decoder.", "encoder.", "output_layer.", "lm_head.", "pooler.", "binary_head.")


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, and what reads it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """A whole tensor in pieces."""

    shape: tuple[int, ...]
    pieces: Sequence[Piece]

    def read(self, layer: int | None) -> torch.Tensor:
        """All of it in fp32, or what it has for one layer.

        Raises:
            CheckpointError: pieces are missing.
        """
        first = () if layer is None else (slice(layer, layer + 1),)
        whole, filled = torch.empty((1, *self.shape[1:]) if first else self.shape), 0
        for piece in self.pieces:
            spans = [slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True)]
            if layer is not None and not spans[0].start <= layer < spans[0].stop:
                continue
            values = piece.load()
            if layer is not None:
                values, spans[0] = values[layer - spans[0].start:][:1], slice(0, 1)
            whole[tuple(spans)] = values
            filled += values.numel()
        if filled != whole.numel():
            raise CheckpointError(f"{filled} of {whole.numel()} numbers of a tensor are stored; files are missing")
        return whole if layer is None else whole[0]


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours is: in theirs of this name, for the layer, and of two halves the one of this number."""

    name: str
    layer: int | None = None
    half: int | None = None


def places(ours: str, config: ModelConfig, stacked: bool = True) -> list[Place]:
    """Where a tensor of ours may be, the likeliest first."""
    stack = "encoder" if config.family == "bert" else "decoder"
    if ours in _NAMES:
        return [Place(_NAMES[ours])]
    module, _, kind = ours.rpartition(".")
    if not module.startswith("layers."):
        return [Place(f"{_MODULES.get(module, f'{stack}.final_layernorm')}.{kind}")]
    _, number, inner = module.split(".", 2)
    within = f"{stack}.layers." if stacked else f"{stack}.layers.{number}."
    return [Place(f"{within}{theirs}{kind}", int(number) if stacked else None, _HALF.get(inner))
            for theirs in _LAYER_MODULES[inner]]


def import_distributed(state: State, stored: Mapping[str, Stored], save_dir: Path, counters: State, *,
                       vocab_size: int | None) -> tuple[Path, RunConfig]:
    """Write the model as the checkpoint of step 0.

    Args:
        state: what the checkpoint holds beside tensors, with the `args`.
        stored: its tensors by their names.
        counters: of a run that has not started.
        vocab_size: real tokens; None takes what `args` says.

    Raises:
        CheckpointError: tensors are missing, superfluous or of another shape, or the model is unsupported.
    """
    ours = {name: tensor for name, tensor in stored.items() if name.startswith(_OF_THE_MODEL)}
    heads = {name.partition(".")[0]: None for name in ours}
    config = RunConfig(model=model_config({**state, "model": heads}, vocab_size))
    wanted = parameter_shapes(config.model)
    found = _found(ours, config.model)
    written = write_weights(save_dir, wanted, lambda name: fitted(_read(ours, found[name]), name, wanted),
                            config=config.to_dict(), counters=dict(counters))
    return written, config


def _found(stored: Mapping[str, Stored], config: ModelConfig) -> dict[str, Place]:
    """Where each tensor of the model is.

    Raises:
        CheckpointError: the checkpoint is not that of this model.
    """
    found: dict[str, Place] = {}
    problems = []
    for ours, shape in parameter_shapes(config).items():
        options = [place for stacked in (True, False) for place in places(ours, config, stacked)]
        place = next((place for place in options if place.name in stored), None)
        if place is None:
            problems.append(f"{options[0].name} is missing")
            continue
        found[ours] = place
        has = stored[place.name].shape
        inner = has if place.layer is None else has[1:]
        inner = inner if place.half is None else (inner[0] // 2, *inner[1:])
        if (place.layer is not None and has[0] != config.num_layers) or inner[1:] != shape[1:] \
                or (inner != shape and ours not in VOCABULARY):
            problems.append(f"{place.name} has shape {has}, and {ours} of the model has {shape}")
    known = {place.name for place in found.values()} | ({"output_layer.weight"} if config.tied else set())
    problems += [f"{name} belongs to no part of the model that the settings describe" for name in stored
                 if name not in known]
    raise_problems("the checkpoint does not hold the model that its settings describe", problems)
    return found


def _read(stored: Mapping[str, Stored], place: Place) -> torch.Tensor:
    whole = stored[place.name].read(place.layer)
    return whole if place.half is None else whole.chunk(2)[place.half]


def exported(config: ModelConfig, read: Callable[[str], torch.Tensor], padded_vocab_size: int) -> dict[str, Any]:
    """All of a model under megatron-core's names, alike layers stacked.

    Args:
        read: a tensor of ours.
        padded_vocab_size: rows of their vocabulary.
    """
    parts: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
    for ours in parameter_shapes(config):
        place, tensor = places(ours, config)[0], read(ours)
        if ours in VOCABULARY:
            rows, tensor = tensor[:config.vocab_size], tensor.new_zeros((padded_vocab_size, *tensor.shape[1:]))
            tensor[:len(rows)] = rows
        parts.setdefault(place.name, {})[-1 if place.layer is None else place.layer, place.half or 0] = tensor
    whole = {}
    for name, tensors in parts.items():
        layers = sorted({layer for layer, _ in tensors})
        joined = [torch.cat([tensors[key] for key in sorted(tensors) if key[0] == layer]) for layer in layers]
        whole[name] = joined[0] if layers == [-1] else torch.stack(joined)
    is_bert = config.family == "bert"
    stack, of_head = ("encoder", {"output_layer._extra_state/shard_0_1": [None]}) if is_bert else ("decoder", {})
    return whole | of_head | {f"{stack}.layers.{module}._extra_state/shard_{layer}_{config.num_layers}": [None]
                    for module in _WITH_STATE for layer in range(config.num_layers)}
