"""Reads a Hugging Face model into a checkpoint of weights, tensor by tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.convert.huggingface import names as hf_names
from megatron_ltd.checkpoint.convert.huggingface.config_import import family_of, model_config
from megatron_ltd.checkpoint.convert.huggingface.folder import CONFIG_NAME, StoredTensor, read_json, read_tensors
from megatron_ltd.checkpoint.convert.huggingface.layout import Mapped
from megatron_ltd.checkpoint.convert.huggingface.tokenizer import carry_in
from megatron_ltd.checkpoint.layout import holds_nothing
from megatron_ltd.checkpoint.manifest import TensorFacts
from megatron_ltd.checkpoint.tensor_file import NAME_OF
from megatron_ltd.checkpoint.whole_tensors import write_checkpoint
from megatron_ltd.config import RunConfig
from megatron_ltd.errors import CheckpointError

SOURCE = "hugging_face"
"""The counter under which an imported checkpoint keeps what an export gives back: config.json and dtype."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
"""Those whose numbers fp32 holds exactly."""
PREFIX = "model."


def import_model(source: Path, save_dir: Path, counters: Mapping[str, Any], *,
                 seq_length: int | None = None) -> tuple[Path, RunConfig]:
    """Write the model of a Hugging Face folder as the checkpoint of step 0, with its tokenizer beside it.

    Args:
        counters: of a run that has not started.
        seq_length: of the samples to train on; all of the model's positions if not given.

    Raises:
        CheckpointError: the folder is damaged or holds a model that is not computed here, or `save_dir` is in use.
    """
    if not source.is_dir():
        raise CheckpointError(f"--from-hf = {source} is not a folder. Name the folder of a Hugging Face model.")
    if not holds_nothing(save_dir):
        raise CheckpointError(f"--save = {save_dir} holds a checkpoint already. Name a new or empty folder.")
    path = source / CONFIG_NAME
    described = read_json(path)
    model, family = model_config(described, path), family_of(described, path)
    if seq_length is not None:
        if not 1 <= seq_length <= model.max_positions:
            raise CheckpointError(f"--seq-length = {seq_length}: the model of {source} has {model.max_positions} "
                                  "positions; choose at most that")
        model = replace(model, seq_length=seq_length)
    mapping = hf_names.mapping(family, model)
    stored = under_full_names(read_tensors(source), family)
    check_fit(stored, mapping, hf_names.tied_copies(family, model), source)
    tokenizer = carry_in(source, save_dir, model.family)
    config = RunConfig(model=model, data=tokenizer)
    facts = {PREFIX + entry.ours: TensorFacts(entry.shape, "F32") for entry in mapping}
    kept = {SOURCE: {"config": described, "dtype": _common_dtype(stored, mapping)}}
    written = write_checkpoint(save_dir, 0, facts, _filled(mapping, stored), config=config.to_dict(),
                               counters={**counters, **kept})
    return written, config


def under_full_names(stored: Mapping[str, StoredTensor], family: str) -> dict[str, StoredTensor]:
    """The tensors under the names of a model with its heads; a model saved without them leaves the prefix out."""
    prefix = hf_names.base_prefix(family)
    weights = {name: tensor for name, tensor in stored.items() if not hf_names.is_constant(name)}
    if any(name.startswith(prefix) for name in weights):
        return weights
    return {name if name.startswith(("lm_head.", "cls.")) else prefix + name: tensor
            for name, tensor in weights.items()}


def check_fit(stored: Mapping[str, StoredTensor], mapping: list[Mapped], copies: Mapping[str, str],
              source: Path) -> None:
    """Every tensor is there, in its shape and in a precision that fp32 holds, and there is nothing else.

    Raises:
        CheckpointError: with all that is wrong.
    """
    shapes = {name: shape for entry in mapping for name, shape in entry.their_shapes().items()}
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        if name in copies:
            if copies[name] in stored and not _equal(tensor, stored[copies[name]]):
                problems.append(f"{name} differs from {copies[name]}, with which config.json says it is tied; set "
                                "tie_word_embeddings to false there, or remove the tensor")
        elif name not in shapes:
            problems.append(f"{name} belongs to no layer of the model that config.json describes")
        elif tensor.shape != shapes[name]:
            problems.append(f"{name} has shape {tensor.shape}, expected {shapes[name]} from config.json")
        elif tensor.dtype not in PRECISIONS:
            problems.append(f"{name} has dtype {tensor.dtype}; fp32, bf16 and fp16 are read")
    raise_problems(f"the tensors of {source} do not fit its {CONFIG_NAME}", problems)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(one.pieces(), other.pieces(), strict=True))


def _common_dtype(stored: Mapping[str, StoredTensor], mapping: list[Mapped]) -> str:
    """The precision of all tensors, or fp32, which holds them all, where they differ."""
    found = {stored[name].dtype for entry in mapping for name in entry.theirs}
    return NAME_OF[found.pop()] if len(found) == 1 else "F32"


def _filled(mapping: list[Mapped], stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Our tensors one at a time, in fp32; rows that pad the vocabulary are zero."""
    for entry in mapping:
        whole = torch.zeros(entry.shape)
        for name, (view, _) in entry.parts(whole).items():
            view.copy_(stored[name].read().reshape(view.shape))
        yield PREFIX + entry.ours, whole
