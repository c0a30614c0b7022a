"""Turns Megatron-LM's classic files, already read, into a checkpoint of weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.convert.megatron.layout import joined, our_names
from megatron_ltd.checkpoint.manifest import TensorFacts
from megatron_ltd.checkpoint.whole_tensors import write_checkpoint
from megatron_ltd.config import ModelConfig, RunConfig
from megatron_ltd.errors import CheckpointError

PREFIX = "model."
State = Mapping[str, Any]
Shapes = Callable[[ModelConfig], Mapping[str, tuple[int, ...]]]

_VOCABULARY = ("embedding.word.weight", "head.weight", "lm_head.bias")
_REFUSED = {"apply_residual_connection_post_layernorm": "post-norm residual connections", "num_experts": "experts",
            "squared_relu": "squared ReLU", "apply_layernorm_1p": "norms with 1 + weight", "multi_latent_attention":
            "multi-latent attention", "qk_layernorm": "norms of queries and keys"}


def import_model(folder: Path, read: Callable[[Path], State], shapes: Shapes, save_dir: Path, counters: State, *,
                 vocab_size: int | None) -> tuple[Path, RunConfig]:
    """Write the model of an `iter_...` folder as the checkpoint of step 0.

    Args:
        read: opens one file.
        shapes: of the parameters of a model, by global name.
        counters: of a run that has not started.
        vocab_size: real tokens; None takes what the file says.

    Raises:
        CheckpointError: files are missing or contradict each other, or hold a model that is not computed here.
    """
    first = read(_file(folder, 0, 0))
    tp, pp = (_argument(first, f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
    # The heads, which tell the families apart, are on the last stage.
    config = RunConfig(model=model_config(read(_file(folder, 0, pp - 1, pp)), vocab_size))
    wanted = dict(shapes(config.model))
    facts = {PREFIX + name: TensorFacts(shape, "F32") for name, shape in wanted.items()}
    cuts = _cuts(folder, read, config.model, tp, pp)
    _check_fit(cuts, wanted, folder)
    written = write_checkpoint(save_dir, 0, facts, _whole_tensors(cuts, wanted), config=config.to_dict(),
                               counters=dict(counters))
    return written, config


def model_config(state: State, vocab_size: int | None) -> ModelConfig:
    """The model that the `args` and the heads in a file of the last stage describe.

    Raises:
        CheckpointError: it is not computed here, or its vocabulary is not known.
    """
    raise_problems("the model is not computed here",
                   [f"--{name.replace('_', '-')} ({what})" for name, what in _REFUSED.items()
                    if _argument(state, name, None)])
    named: Mapping[str, Any] = state.get("model", state.get("model0", {}))
    real = vocab_size if vocab_size is not None else _argument(state, "vocab_size", None)
    padded = _argument(state, "padded_vocab_size", None)
    if real is None or (padded is not None and real > padded):
        raise CheckpointError(f"--vocab-size = {real}: the files tell only the padded size, {padded}; give the number "
                              "of tokens of the tokenizer, at most that")
    rope = _argument(state, "position_embedding_type", "learned_absolute") == "rope" or \
        bool(_argument(state, "use_rotary_position_embeddings", False))
    groups = _argument(state, "num_query_groups", None) if _argument(state, "group_query_attention", False) else None
    bert = "binary_head" in named or "lm_head" in named
    return ModelConfig(
        family="bert" if bert else "gpt", num_layers=_needed(state, "num_layers"),
        hidden_size=_needed(state, "hidden_size"), ffn_hidden_size=_needed(state, "ffn_hidden_size"),
        num_attention_heads=_needed(state, "num_attention_heads"), kv_channels=_argument(state, "kv_channels", None),
        group_query_attention=groups is not None, num_query_groups=groups, seq_length=_needed(state, "seq_length"),
        max_position_embeddings=_argument(state, "max_position_embeddings", None),
        position_embedding_type="rope" if rope else "learned_absolute",
        rotary_base=_argument(state, "rotary_base", 10000), rotary_percent=_argument(state, "rotary_percent", 1.0),
        normalization=_argument(state, "normalization", "LayerNorm"),
        norm_epsilon=_argument(state, "norm_epsilon", _argument(state, "layernorm_epsilon", 1e-5)),
        swiglu=bool(_argument(state, "swiglu", False)),
        # Megatron-LM's fused GELU, its default, is the tanh approximation.
        openai_gelu=not _argument(state, "swiglu", False) and bool(
            _argument(state, "openai_gelu", False) or _argument(state, "bias_gelu_fusion", True)),
        disable_bias_linear=not _argument(state, "add_bias_linear", True),
        add_qkv_bias=bool(_argument(state, "add_qkv_bias", False)),
        untie_embeddings_and_output_weights=bool(_argument(state, "untie_embeddings_and_output_weights", False)),
        bert_no_binary_head=bert and "binary_head" not in named, vocab_size=int(real))


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
                                  "not read; save it again without --num-layers-per-virtual-pipeline-stage")
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
    """Raises:
    CheckpointError: tensors are missing, superfluous, or of another shape.
    """
    problems = [f"{name} is missing" for name in wanted if name not in cuts]
    for name, cut in cuts.items():
        shape = tuple(cut.whole(name, device="meta").shape)
        if name not in wanted:
            problems.append(f"{name} belongs to no part of the model that the settings describe")
        elif shape != wanted[name] and (name not in _VOCABULARY or shape[1:] != wanted[name][1:]):
            problems.append(f"{name} has shape {shape}, expected {wanted[name]}")
    raise_problems(f"{folder} does not hold the model that its settings describe", problems)


def _whole_tensors(cuts: Mapping[str, _Cut],
                   wanted: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor at a time, in fp32, with the vocabulary padded as ours is."""
    for name, shape in wanted.items():
        tensor = cuts[name].whole(name).float()
        yield PREFIX + name, _with_rows(tensor, shape[0]) if name in _VOCABULARY else tensor


def _with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """The first rows of a vocabulary's table, or more of them, which are zero."""
    whole = table.new_zeros(rows, *table.shape[1:])
    whole[:len(table)] = table[:rows]
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
