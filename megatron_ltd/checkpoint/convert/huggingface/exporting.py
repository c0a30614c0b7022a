"""Writes the weights of a checkpoint as a Hugging Face model folder, tensor by tensor."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.convert.huggingface.config import model_config
from megatron_ltd.checkpoint.convert.huggingface.describe import computes_the_same, describe
from megatron_ltd.checkpoint.convert.huggingface.families import FAMILY_OF
from megatron_ltd.checkpoint.convert.huggingface.folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from megatron_ltd.checkpoint.convert.huggingface.importing import SOURCE
from megatron_ltd.checkpoint.convert.huggingface.names import Mapped, mapping
from megatron_ltd.checkpoint.convert.huggingface.tokenizer import FILES, carry_out, make_agree
from megatron_ltd.checkpoint.durable import fsync_folder, make_folder, remove_folder, rename_folder, write_file
from megatron_ltd.checkpoint.manifest import Manifest, read_manifest
from megatron_ltd.checkpoint.tensor_file import DTYPE_OF, Chunk, all_finite, whole_chunk, write_tensors
from megatron_ltd.checkpoint.whole_tensors import PREFIX, CheckpointTensors
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import CheckpointError
from megatron_ltd.model.arithmetic.shapes import parameter_shapes

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SHARD_BYTES = 5 << 30
"""The largest file, unless one tensor is larger."""


@dataclass(frozen=True)
class Source:
    """What to write, besides where.

    Args:
        config: the checkpoint's, with the tokenizer's files where they are now.
        dtype: F32, BF16 or F16; None for the one that an imported model came in, and fp32 otherwise.
        eod: id and text of the end-of-document token, where a tokenizer is known.
        shard_bytes: the largest file.
        tokenizer: whose ids the exported one must give, where it is known.
    """

    checkpoint: Path
    config: RunConfig
    dtype: str | None = None
    eod: tuple[int, str] | None = None
    shard_bytes: int = SHARD_BYTES
    tokenizer: Tokenizer | None = None


def export_model(source: Source, target: Path) -> list[str]:
    """Write the folder; returns the names of the tokenizer's files in it.

    Raises:
        CheckpointError: the checkpoint is damaged, its model cannot be written there, or the folder is in use.
    """
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"--output = {target} exists already. Name a new or empty folder.")
    manifest = read_manifest(source.checkpoint)
    config = source.config
    _described(config.model, manifest, source)
    tensors = CheckpointTensors(source.checkpoint, manifest)
    missing = [name for name in parameter_shapes(config.model) if PREFIX + name not in manifest.tensors]
    if missing:
        raise CheckpointError(f"{source.checkpoint} lacks {', '.join(missing[:5])}: it is no whole model")
    partial = target.with_name(f".tmp-{target.name}")
    try:
        make_folder(target.parent.resolve())
        if os.path.lexists(partial):
            remove_folder(partial)
        os.mkdir(partial)
        try:
            model, described, dtype = _write_description(partial, manifest, source)
            carried = sorted(name for name in FILES if (partial / name).is_file())
            entries = mapping(FAMILY_OF[described["model_type"]], model)
            _write_weights(partial, entries, tensors, dtype, source.shard_bytes)
            if "generation_config.json" not in carried and config.model.family == "gpt":
                ids = {name: value for name, value in described.items() if name.endswith("_token_id")}
                _write_json(partial / "generation_config.json", {"_from_model_config": True, **ids})
            fsync_folder(partial)
            if target.is_dir():
                os.rmdir(target)
            rename_folder(partial, target)
        except BaseException:
            remove_folder(partial)
            raise
    except OSError as error:
        raise CheckpointError(f"--output = {target} cannot be written: {error}") from error
    return carried


def _write_description(folder: Path, manifest: Manifest, source: Source) -> tuple[ModelConfig, dict[str, Any], str]:
    """Write config.json and the tokenizer's files; returns the model to write, its config.json and the dtype.

    `transformers` gives every qwen2 the tokenizer of Qwen 2. A model with another one is written as a type that has a
    bias in attention's output projection too, which is zero.

    Raises:
        CheckpointError: `transformers` would not give the ids of training.
    """
    model, data = source.config.model, source.config.data
    with_bias = replace(model, add_proj_bias=True)
    for candidate in (model, with_bias):
        described, dtype = _described(candidate, manifest, source)
        _write_json(folder / CONFIG_NAME, described)
        carry_out(data, folder, None if source.eod is None else source.eod[1])
        if source.tokenizer is None:
            break
        try:
            make_agree(folder, source.tokenizer, data.tokenizer_type or "")
            break
        except CheckpointError:
            if described["model_type"] != "qwen2":
                raise
    return candidate, described, dtype


def _described(model: ModelConfig, manifest: Manifest, source: Source) -> tuple[dict[str, Any], str]:
    """config.json and the dtype of the tensors. An imported model gives back the config.json it came with."""
    remembered = manifest.counters.get(SOURCE)
    imported: dict[str, Any] = remembered if isinstance(remembered, dict) else {"config": None, "dtype": "F32"}
    original = imported["config"]
    dtype: str = source.dtype or imported["dtype"]
    if original is not None and computes_the_same(model_config(original, source.checkpoint), model):
        described = {name: value for name, value in original.items() if name != "dtype"}
    else:
        eod = None if source.eod is None else source.eod[0]
        bos = None if source.tokenizer is None else source.tokenizer.bos
        described = describe(model) | {"bos_token_id": eod if bos is None else bos, "eos_token_id": eod}
    return {**described, "torch_dtype": DTYPES[dtype]}, dtype


def _write_weights(folder: Path, entries: list[Mapped], tensors: CheckpointTensors, dtype: str,
                   shard_bytes: int) -> None:
    source_of = {name: entry for entry in entries for name in entry.theirs}
    planned = [whole_chunk(name, dtype, shape) for entry in entries for name, shape in entry.their_shapes().items()]

    @lru_cache(maxsize=1)  # query, key and value come from one tensor, one after the other
    def read(ours: str, shape: tuple[int, ...]) -> torch.Tensor:
        stored = PREFIX + ours in tensors.manifest.tensors
        return tensors.read(PREFIX + ours) if stored else torch.zeros(shape)

    def values(shard: list[Chunk]) -> Iterator[torch.Tensor]:
        for name in (chunk.name for chunk in shard):
            entry = source_of[name]
            view, shape = entry.parts(read(entry.ours, entry.shape))[name]
            if entry.config.apply_layernorm_1p and entry.ours.endswith("norm.weight"):
                view = 1.0 + view
            tensor = (view.reshape(shape) * folded_scale(entry.ours, entry.config)).to(DTYPE_OF[dtype])
            if not all_finite(tensor):
                raise CheckpointError(f"{name} does not fit {dtype}: it would be infinite. Choose another --dtype")
            yield tensor
            del view, tensor

    shards: list[list[Chunk]] = [[]]
    for chunk in planned:
        if shards[-1] and sum(other.size_bytes for other in [*shards[-1], chunk]) > shard_bytes:
            shards.append([])
        shards[-1].append(chunk)
    numbers = range(1, len(shards) + 1)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in numbers] if len(shards) > 1 else [SINGLE_NAME]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, shard, values(shard), placed=False)
    if len(shards) > 1:
        total = sum(chunk.size_bytes for chunk in planned)
        placed = {chunk.name: file for file, shard in zip(files, shards, strict=True) for chunk in shard}
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": placed})


def folded_scale(name: str, config: ModelConfig) -> float:
    """The factor on a tensor that stands for a multiplier of CompleteP, which models there do not have."""
    before = config.norm_placement == "before"
    last_of_branch = (".attention.proj.", ".mlp.fc2.") if before else (".attention_norm.", ".mlp_norm.")
    if any(part in name for part in last_of_branch):
        return 1.0 / config.depth_multiplier
    return 1.0 / config.width_multiplier if name.startswith("final_norm.") else 1.0


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())
