"""Turns Megatron-LM's pickled files (`--ckpt-format torch`), already read, into a checkpoint of weights.

The modules of the classic models and of megatron-core's have different names (classic: dense_h_to_4h). A rank
(tensor t, pipeline p) holds the layers of its stage, counted from 0, and of each tensor its part:

    rows cut        word embedding, output layer, query/key/value, dense_h_to_4h, the vocabulary's bias
    columns cut     attention.dense and dense_4h_to_h
    whole           everything else; the first part counts

Rows of the query/key/value projection are, by version of the checkpoint: 0 all queries, all keys, all values of a
rank; 1.0 interleaved by channel; from 2.0 on query, key and value of each head (and of each group of heads). Ours is
the last. With SwiGLU a rank's dense_h_to_4h holds its gate rows and then its up rows.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.convert.megatron.args import State, argument, model_config
from megatron_ltd.checkpoint.whole_tensors import write_weights
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.model.arithmetic.shapes import VOCABULARY, parameter_shapes

Tensors = dict[str, torch.Tensor]

_ROWS_CUT = (*VOCABULARY, "attention.qkv.weight", "attention.qkv.bias", "mlp.fc1.weight", "mlp.fc1.bias")
_COLUMNS_CUT = ("attention.proj.weight", "mlp.fc2.weight")
_STACKS = ("language_model.encoder.", "decoder.", "encoder.")
"""Where the layers are: before megatron-core, in its GPT and in its BERT."""
_NAMES = {
    "embedding.word_embeddings": "embedding.word",
    "embedding.position_embeddings": "embedding.position",
    "embedding.tokentype_embeddings": "embedding.token_type",
    "output_layer": "head",
    "pooler.dense": "pooler",
    "lm_head": "lm_head",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layernorm": "lm_head.norm",
    "lm_head.layer_norm": "lm_head.norm",
    "binary_head": "binary_head",
}
"""Their module -> ours."""
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attention.query_key_value": "attention.qkv",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.q_layernorm": "attention.query_norm",
    "self_attention.k_layernorm": "attention.key_norm",
    "self_attention.dense": "attention.proj",
    "self_attention.linear_proj": "attention.proj",
    "post_attention_layernorm": "mlp_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.fc1",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.dense_4h_to_h": "mlp.fc2",
    "mlp.linear_fc2": "mlp.fc2",
}
_FUSED = {"self_attention.linear_qkv.layer_norm_": "input_layernorm.",
          "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}
"""A norm that Transformer Engine keeps in the projection after it -> the norm by itself."""
_DERIVED = ("_extra_state", "word_embeddings_for_head", "rotary_pos_emb")
"""In the names of what is not read: the copy of a tied embedding, and what follows from the settings."""


def import_model(folder: Path, read: Callable[[Path], State], save_dir: Path, counters: State, *,
                 vocab_size: int | None) -> tuple[Path, RunConfig]:
    """Write the model of an `iter_...` folder as the checkpoint of step 0.

    Args:
        read: opens one file.
        counters: of a run that has not started.
        vocab_size: real tokens; None takes what the file says.

    Raises:
        CheckpointError: files are missing or contradict each other, or hold an unsupported model.
    """
    first = read(_file(folder, 0, 0))
    tp, pp = (argument(first, f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
    # The heads, which tell the families apart, are on the last stage.
    config = RunConfig(model=model_config(read(_file(folder, 0, pp - 1, pp)), vocab_size))
    wanted = parameter_shapes(config.model)
    cuts = _cuts(folder, read, config.model, tp, pp)
    _check_fit(cuts, wanted, folder)
    written = write_weights(save_dir, wanted, lambda name: fitted(cuts[name].whole(name), name, wanted),
                            config=config.to_dict(), counters=dict(counters))
    return written, config


@dataclass(frozen=True)
class _Cut:
    """A tensor in the parts of the tensor-parallel ranks; with SwiGLU one is made of half of each."""

    name: str
    parts: tuple[torch.Tensor, ...]
    config: ModelConfig
    version: float

    def whole(self, name: str, *, device: str = "cpu") -> torch.Tensor:
        """The tensor of this name; on the device "meta" its shape alone, for nothing."""
        return joined(self.name, [part.to(device) for part in self.parts], self.config, self.version)[name]


def _cuts(folder: Path, read: Callable[[Path], State], config: ModelConfig, tp: int, pp: int) -> dict[str, _Cut]:
    """Where each tensor of the whole model is; the files are mapped, not read."""
    found: dict[str, _Cut] = {}
    layers = 0
    for stage in range(pp):
        states = [read(_file(folder, rank, stage, pp)) for rank in range(tp)]
        if any("model" not in state for state in states):
            raise CheckpointError(f"{folder} was written with virtual pipeline stages (model0, model1, ...), which are "
                                  "not supported; save it again without --num-layers-per-virtual-pipeline-stage")
        ranks = [our_names(state["model"], layers) for state in states]
        if config.tied:  # the last stage has a copy of the embedding
            ranks = [{name: part for name, part in names.items() if name != "head.weight"} for names in ranks]
        raise_problems(f"{folder}: the tensor-parallel ranks of stage {stage} differ",
                       [f"rank {number} has other tensors than rank 0" for number, names in enumerate(ranks)
                        if names.keys() != ranks[0].keys()])
        for name in ranks[0]:
            parts = tuple(names[name] for names in ranks)
            cut = _Cut(name, parts, config, float(states[0].get("checkpoint_version", 0)))
            found |= dict.fromkeys(joined(name, [part.to("meta") for part in parts], config, cut.version), cut)
        layers += len({name.split(".")[1] for name in ranks[0] if name.startswith("layers.")})
    return found


def _check_fit(cuts: Mapping[str, _Cut], wanted: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Make sure that the files hold the whole model and nothing else.

    Raises:
        CheckpointError: tensors are missing, superfluous, or of another shape.
    """
    problems = [f"{name} is missing" for name in wanted if name not in cuts]
    for name, cut in cuts.items():
        shape = tuple(cut.whole(name, device="meta").shape)
        if name not in wanted:
            problems.append(f"{name} belongs to no part of the model that the settings describe")
        elif shape != wanted[name] and (name not in VOCABULARY or shape[1:] != wanted[name][1:]):
            problems.append(f"{name} has shape {shape}, expected {wanted[name]}")
    raise_problems(f"{folder} does not hold the model that its settings describe", problems)


def fitted(tensor: torch.Tensor, name: str, wanted: Mapping[str, tuple[int, ...]]) -> torch.Tensor:
    """A tensor in fp32; a vocabulary is cut or filled up with zeros to the rows of ours."""
    tensor = tensor.float()
    if name not in VOCABULARY:
        return tensor
    whole = tensor.new_zeros(wanted[name])
    whole[:len(tensor)] = tensor[:len(whole)]
    return whole


def _file(folder: Path, tensor: int, stage: int, stages: int | None = None) -> Path:
    """The file of a rank; with one stage the folder's name has no number for it."""
    names = [f"mp_rank_{tensor:02d}_{stage:03d}", f"mp_rank_{tensor:02d}"]
    for name in names[:1] if stages is not None and stages > 1 else names:
        path = folder / name / "model_optim_rng.pt"
        if path.is_file():
            return path
    raise CheckpointError(f"{folder} has no {' or '.join(names)}/model_optim_rng.pt. Name the folder of one iteration "
                          "(iter_0001000, or release), with the files of all ranks in it.")


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
        if any(word in name for word in _DERIVED):
            continue
        ours = _our_name(name, first_layer)
        if ours is None:
            unknown.append(theirs)
        else:
            found[ours] = tensor
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors belong to no part of a GPT or BERT, such as {unknown[0]}; other "
                              "models cannot be imported")
    return found


def _our_name(name: str, first_layer: int) -> str | None:
    """None for what is not known."""
    for fused, norm in _FUSED.items():
        name = name.replace(fused, norm)
    module, _, kind = name.rpartition(".")
    inner = next((module.removeprefix(stack) for stack in _STACKS if module.startswith(stack)), None)
    ours = _NAMES.get(module.removeprefix("language_model."))
    if inner == "final_layernorm":
        ours = "final_norm"
    elif inner is not None and (match := re.fullmatch(r"layers\.(\d+)\.(.+)", inner)) and match[2] in _LAYER_NAMES:
        ours = f"layers.{first_layer + int(match[1])}.{_LAYER_NAMES[match[2]]}"
    elif name == "output_layer.bias":
        return "lm_head.bias"
    return None if ours is None else f"{ours}.{kind}"


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
