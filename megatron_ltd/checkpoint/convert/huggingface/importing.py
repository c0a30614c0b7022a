"""Reads a Hugging Face model into a checkpoint of weights, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.convert.huggingface.config import family_of, model_config
from megatron_ltd.checkpoint.convert.huggingface.folder import CONFIG_NAME, StoredTensor, read_json, read_tensors
from megatron_ltd.checkpoint.convert.huggingface.names import FAMILIES, Mapped, is_constant, mapping, tied_copies
from megatron_ltd.checkpoint.convert.huggingface.tokenizer import carry_in
from megatron_ltd.checkpoint.whole_tensors import check_unused, write_weights
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.model.arithmetic.rope_scaling import rope_scaling

SOURCE = "hugging_face"
"""The counter under which an imported checkpoint keeps what an export gives back: config.json and dtype."""
PRECISIONS = ("F32", "BF16", "F16")
"""Those whose numbers fp32 holds exactly."""


def import_model(source: Path, save_dir: Path, counters: Mapping[str, Any], *,
                 seq_length: int | None = None) -> tuple[Path, RunConfig]:
    """Write the model of a Hugging Face folder as the checkpoint of step 0, with its tokenizer beside it.

    Args:
        counters: of a run that has not started.
        seq_length: of the samples to train on; all of the model's positions if not given.

    Raises:
        CheckpointError: the folder is damaged or holds an unsupported model, or `save_dir` is in use.
    """
    if not source.is_dir():
        raise CheckpointError(f"--from-hf = {source} is not a folder. Name the folder of a Hugging Face model.")
    check_unused(save_dir)
    path = source / CONFIG_NAME
    described = read_json(path)
    model, family = model_config(described, path), family_of(described, path)
    if seq_length is not None:
        scaling = rope_scaling(model)
        grows = scaling is not None and scaling.kind == "dynamic"  # made for samples beyond the positions
        if seq_length < 1 or (seq_length > model.max_positions and not grows):
            raise CheckpointError(f"--seq-length = {seq_length}: the model of {source} has {model.max_positions} "
                                  "positions; choose 1 to that many")
        model = replace(model, seq_length=seq_length)
    entries = {entry.ours: entry for entry in mapping(family, model)}
    stored = under_full_names(read_tensors(source), FAMILIES[family].base)
    their_shapes = {name: shape for entry in entries.values() for name, shape in entry.their_shapes().items()}
    check_fit(stored, their_shapes, tied_copies(family, model), source)
    config = RunConfig(model=model, data=carry_in(source, save_dir, model.family))
    dtypes = {stored[name].dtype for name in their_shapes}
    kept = {SOURCE: {"config": described, "dtype": dtypes.pop() if len(dtypes) == 1 else "F32"}}
    written = write_weights(save_dir, {name: entry.shape for name, entry in entries.items()},
                            lambda name: _filled(entries[name], stored), config=config.to_dict(),
                            counters={**counters, **kept})
    return written, config


def under_full_names(stored: Mapping[str, StoredTensor], base: str) -> dict[str, StoredTensor]:
    """The tensors under the names of a model with its heads; a model saved without them leaves the prefix out."""
    weights = {name: tensor for name, tensor in stored.items() if not is_constant(name)}
    if any(name.startswith(base) for name in weights):
        return weights
    return {name if name.startswith(("lm_head.", "cls.")) else base + name: tensor for name, tensor in weights.items()}


def check_fit(stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], copies: Mapping[str, str],
              source: Path) -> None:
    """Every tensor is there, in its shape and in a precision that fp32 holds, and there is nothing else.

    Raises:
        CheckpointError: with all that is wrong.
    """
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        if name in copies:
            original = stored.get(copies[name])
            if original is not None and not _equal(tensor, original):
                problems.append(f"{name} differs from {copies[name]}, with which config.json says it is tied; set "
                                "tie_word_embeddings to false there, or remove the tensor")
        elif name not in shapes:
            problems.append(f"{name} belongs to no layer of the model that config.json describes")
        elif tensor.shape != shapes[name]:
            problems.append(f"{name} has shape {tensor.shape}, expected {shapes[name]} from config.json")
        elif tensor.dtype not in PRECISIONS:
            problems.append(f"{name} has dtype {tensor.dtype}; only {', '.join(PRECISIONS)} can be read")
    raise_problems(f"the tensors of {source} do not fit its {CONFIG_NAME}", problems)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    same_kind = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same_kind and torch.equal(one.read(), other.read())


def _filled(entry: Mapped, stored: Mapping[str, StoredTensor]) -> torch.Tensor:
    """One of our tensors, in fp32; rows that pad the vocabulary are zero."""
    whole = torch.zeros(entry.shape)
    for name, (view, _) in entry.parts(whole).items():
        view.copy_(stored[name].read().reshape(view.shape))
    return whole
