"""Writes the weights of a checkpoint as a Hugging Face model folder, tensor by tensor."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from megatron_ltd.checkpoint.convert.huggingface import names as hf_names
from megatron_ltd.checkpoint.convert.huggingface.config_export import DTYPES, computes_the_same, describe
from megatron_ltd.checkpoint.convert.huggingface.config_import import model_config
from megatron_ltd.checkpoint.convert.huggingface.folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from megatron_ltd.checkpoint.convert.huggingface.importing import PREFIX, SOURCE
from megatron_ltd.checkpoint.convert.huggingface.layout import Mapped
from megatron_ltd.checkpoint.convert.huggingface.tokenizer import carry_out
from megatron_ltd.checkpoint.durable import NewFile, fsync_folder, make_folder, remove_folder, rename_folder, write_file
from megatron_ltd.checkpoint.manifest import Manifest, read_manifest
from megatron_ltd.checkpoint.tensor_file import DTYPE_OF
from megatron_ltd.checkpoint.verify import all_finite
from megatron_ltd.checkpoint.whole_tensors import CheckpointTensors, write_values
from megatron_ltd.config import DataConfig, ModelConfig, RunConfig
from megatron_ltd.errors import CheckpointError

SHARD_BYTES = 5 << 30
"""The largest file, unless one tensor is larger."""


@dataclass(frozen=True)
class Source:
    """What to write, besides where.

    Args:
        dtype: F32, BF16 or F16; None for the one that an imported model came in, and fp32 otherwise.
        tokenizer: the tokenizer's settings; those of the checkpoint with moved files replaced.
        eod: id and text of the end-of-document token, where a tokenizer is known.
        shard_bytes: the largest file.
    """

    checkpoint: Path
    dtype: str | None = None
    tokenizer: DataConfig | None = None
    eod: tuple[int, str] | None = None
    shard_bytes: int = SHARD_BYTES


def export_model(source: Source, target: Path) -> list[str]:
    """Write the folder; returns the names of the tokenizer's files in it.

    Raises:
        CheckpointError: the checkpoint is damaged, its model cannot be written there, or the folder is in use.
    """
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"--to-hf = {target} exists already. Name a new or empty folder.")
    manifest = read_manifest(source.checkpoint)
    config = _run_config(manifest, source.checkpoint)
    described, dtype = _described(config.model, manifest, source)
    family = hf_names.mapping(_family(described), config.model)
    tensors = CheckpointTensors(source.checkpoint, manifest)
    missing = [entry.ours for entry in family if manifest.stored_name(PREFIX + entry.ours) is None]
    if missing:
        raise CheckpointError(f"{source.checkpoint} lacks {', '.join(missing[:5])}: it is no whole model")
    partial = target.with_name(f".tmp-{target.name}")
    try:
        make_folder(target.parent.resolve())
        if os.path.lexists(partial):
            remove_folder(partial)
        os.mkdir(partial)
        try:
            _write_json(partial / CONFIG_NAME, described)
            _write_weights(partial, family, tensors, dtype, source.shard_bytes)
            carried = carry_out(source.tokenizer or config.data, partial, None if source.eod is None else source.eod[1])
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
        raise CheckpointError(f"--to-hf = {target} cannot be written: {error}") from error
    return carried


def _run_config(manifest: Manifest, path: Path) -> RunConfig:
    try:
        return RunConfig.from_dict(manifest.config)
    except TypeError as error:
        raise CheckpointError(f"{path} was written by another version of megatron_ltd: {error}") from error


def _family(described: Mapping[str, Any]) -> str:
    kind = described["model_type"]
    return "llama" if kind in ("llama", "mistral", "qwen2") else kind


def _described(model: ModelConfig, manifest: Manifest, source: Source) -> tuple[dict[str, Any], str]:
    """config.json and the dtype of the tensors. An imported model gives back the config.json it came with."""
    remembered = manifest.counters.get(SOURCE)
    original: dict[str, Any] | None = None
    if isinstance(remembered, dict):
        original = dict(remembered["config"])
        if not computes_the_same(model_config(original, source.checkpoint), model):
            original = None
    dtype = source.dtype or (remembered["dtype"] if isinstance(remembered, dict) else "F32")
    described = original
    if described is None:
        described = describe(model)
        if source.eod is not None:
            described |= {"bos_token_id": source.eod[0], "eos_token_id": source.eod[0]}
        else:
            described |= {"bos_token_id": None, "eos_token_id": None}
    described.pop("dtype", None)
    return {**described, "torch_dtype": DTYPES[dtype]}, dtype


@dataclass(frozen=True)
class _Planned:
    """A tensor to write."""

    name: str
    entry: Mapped
    shape: tuple[int, ...]

    def size_bytes(self, dtype: str) -> int:
        return prod(self.shape) * DTYPE_OF[dtype].itemsize


def _write_weights(folder: Path, mapping: list[Mapped], tensors: CheckpointTensors, dtype: str,
                   shard_bytes: int) -> None:
    planned = [_Planned(name, entry, shape) for entry in mapping for name, shape in entry.their_shapes().items()]
    shards: list[list[_Planned]] = [[]]
    for tensor in planned:
        held = sum(other.size_bytes(dtype) for other in shards[-1])
        if shards[-1] and held + tensor.size_bytes(dtype) > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    read = lru_cache(maxsize=1)(tensors.read)  # query, key and value come from one tensor, one after the other
    names = [SINGLE_NAME] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                                                    for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        with NewFile(folder / file) as out:
            out.write(_header(shard, dtype))
            for tensor in shard:
                view, shape = tensor.entry.parts(read(PREFIX + tensor.entry.ours))[tensor.name]
                values = view.reshape(shape).to(DTYPE_OF[dtype])
                if not all_finite(values):
                    raise CheckpointError(f"{tensor.name} does not fit {dtype}: it would be infinite. Choose another "
                                          "--dtype")
                write_values(out, values)
                del view, values
            out.finish()
    if len(shards) > 1:
        total = sum(tensor.size_bytes(dtype) for tensor in planned)
        placed = {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": placed})


def _header(shard: list[_Planned], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in shard:
        end = position + tensor.size_bytes(dtype)
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())
