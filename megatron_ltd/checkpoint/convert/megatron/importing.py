"""Turns Megatron-LM's classic files, already read, into a checkpoint of weights.

A rank (tensor t, pipeline p) holds the layers of its stage, counted from 0, and of each tensor its part:

    rows cut        word embedding, output layer, query/key/value, dense_h_to_4h, the vocabulary's bias
    columns cut     attention.dense and dense_4h_to_h
    whole           everything else; the first part counts

Rows of the query/key/value projection are, by version of the checkpoint: 0 all queries, all keys, all values of a
rank; 1.0 interleaved by channel; from 2.0 on query, key and value of each head (and of each group of heads). Ours is
the last. With SwiGLU a rank's dense_h_to_4h holds its gate rows and then its up rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.whole_tensors import PREFIX, write_weights
from megatron_ltd.config import ModelConfig, RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.model.arithmetic.shapes import VOCABULARY, parameter_shapes

State = Mapping[str, Any]
Tensors = dict[str, torch.Tensor]

_ROWS_CUT = (*VOCABULARY, "attention.qkv.weight", "attention.qkv.bias", "mlp.fc1.weight", "mlp.fc1.bias")
_COLUMNS_CUT = ("attention.proj.weight", "mlp.fc2.weight")
_ENCODER = "language_model.encoder"
_NAMES = {
    "language_model.embedding.word_embeddings": "embedding.word",
    "language_model.embedding.position_embeddings": "embedding.position",
    "language_model.embedding.tokentype_embeddings": "embedding.token_type",
    "language_model.output_layer": "head",
    f"{_ENCODER}.final_layernorm": "final_norm",
    "language_model.pooler.dense": "pooler",
    "lm_head": "lm_head",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layernorm": "lm_head.norm",
    "binary_head": "binary_head",
}
"""Their module -> ours."""
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attention.query_key_value": "attention.qkv",
    "self_attention.dense": "attention.proj",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.fc1",
    "mlp.dense_4h_to_h": "mlp.fc2",
}
_DERIVED = ("_extra_state", "word_embeddings_for_head", "rotary_pos_emb")
"""In the names of what is not read: the copy of a tied embedding, and what follows from the settings."""
_REFUSED = {
    "apply_residual_connection_post_layernorm": "post-norm residual connections",
    "num_experts": "experts",
    "squared_relu": "squared ReLU",
    "apply_layernorm_1p": "norms with 1 + weight",
    "multi_latent_attention": "multi-latent attention",
    "qk_layernorm": "norms of queries and keys",
    "window_size": "sliding windows",
    "no_rope_freq": "layers without rotary positions",
}
_NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
_SAME_NAME = ("kv_channels", "max_position_embeddings", "rotary_base", "rotary_percent", "use_rope_scaling",
              "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "normalization", "swiglu", "add_qkv_bias",
              "untie_embeddings_and_output_weights")
"""Settings whose name and default are ours."""


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
    tp, pp = (_argument(first, f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
    # The heads, which tell the families apart, are on the last stage.
    config = RunConfig(model=model_config(read(_file(folder, 0, pp - 1, pp)), vocab_size))
    wanted = parameter_shapes(config.model)
    cuts = _cuts(folder, read, config.model, tp, pp)
    _check_fit(cuts, wanted, folder)
    written = write_weights(save_dir, {PREFIX + name: shape for name, shape in wanted.items()},
                            lambda name: _whole_tensor(cuts, wanted, name.removeprefix(PREFIX)),
                            config=config.to_dict(), counters=dict(counters))
    return written, config


def model_config(state: State, vocab_size: int | None) -> ModelConfig:
    """The model that the `args` and the heads in a file of the last stage describe.

    Raises:
        CheckpointError: it is unsupported, or its vocabulary is not known.
    """
    raise_problems("the model is not supported",
                   [f"--{name.replace('_', '-')} ({what})" for name, what in _REFUSED.items()
                    if _argument(state, name, None)])
    named: Mapping[str, Any] = state.get("model", state.get("model0", {}))
    real = vocab_size if vocab_size is not None else _argument(state, "vocab_size", None)
    padded = _argument(state, "padded_vocab_size", None)
    if real is None or (padded is not None and real > padded):
        raise CheckpointError(f"--vocab-size = {real}: the files tell only the padded size, {padded}; give the number "
                              "of tokens of the tokenizer, at most that")
    settings = {name: _argument(state, name, getattr(ModelConfig, name)) for name in _SAME_NAME}
    settings |= {name: _needed(state, name) for name in _NEEDED}
    settings["norm_epsilon"] = _argument(state, "norm_epsilon", _argument(state, "layernorm_epsilon", 1e-5))
    rope = _argument(state, "position_embedding_type", None) == "rope" or \
        _argument(state, "use_rotary_position_embeddings", False)
    groups = _argument(state, "num_query_groups", None) if _argument(state, "group_query_attention", False) else None
    # Megatron-LM's fused GELU, its default, is the tanh approximation.
    tanh_gelu = _argument(state, "openai_gelu", False) or _argument(state, "bias_gelu_fusion", True)
    bert = "binary_head" in named or "lm_head" in named
    return ModelConfig(
        **settings, family="bert" if bert else "gpt", vocab_size=int(real),
        position_embedding_type="rope" if rope else "learned_absolute",
        group_query_attention=groups is not None, num_query_groups=groups,
        openai_gelu=bool(tanh_gelu and not settings["swiglu"]),
        disable_bias_linear=not _argument(state, "add_bias_linear", True),
        bert_no_binary_head=bert and "binary_head" not in named)


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


def _whole_tensor(cuts: Mapping[str, _Cut], wanted: Mapping[str, tuple[int, ...]], name: str) -> torch.Tensor:
    return fitted(cuts[name].whole(name), name, wanted)


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


def _argument(state: State, name: str, default: Any) -> Any:
    value = getattr(state.get("args"), name, None)
    return default if value is None else value


def _needed(state: State, name: str) -> int:
    value = _argument(state, name, None)
    if not isinstance(value, int):
        raise CheckpointError(f"the file's args have no {name}, without which its model is not known")
    return value


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
        raise CheckpointError(f"{len(unknown)} tensors are none of the classic GPT's or BERT's, such as {unknown[0]}; "
                              "models of megatron.core are saved under other names and cannot be imported")
    return found


def _our_name(name: str, first_layer: int) -> str | None:
    """None for what is not known."""
    module, _, kind = name.rpartition(".")
    ours = _NAMES.get(module)
    if ours is None and module.startswith(f"{_ENCODER}.layers."):
        number, _, inner = module.removeprefix(f"{_ENCODER}.layers.").partition(".")
        if number.isdigit() and inner in _LAYER_NAMES:
            ours = f"layers.{first_layer + int(number)}.{_LAYER_NAMES[inner]}"
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
