"""Reads a Hugging Face model folder: config.json and safetensors files, tensor by tensor, with plain reads.

Nothing in the folder is executed or unpickled. File names come from its index and are names, never paths. The files
themselves may be links, as a download cache makes them.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.durable import READ_BYTES, open_regular, read_exactly, read_file
from megatron_ltd.checkpoint.manifest import FILE_NAME
from megatron_ltd.checkpoint.tensor_file import DTYPE_OF, HEADER_LIMIT_BYTES
from megatron_ltd.errors import CheckpointError

CONFIG_NAME, INDEX_NAME, SINGLE_NAME = "config.json", "model.safetensors.index.json", "model.safetensors"
JSON_LIMIT_BYTES = 1 << 26
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are: [begin, begin + size) of a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Consecutive runs of the tensor's numbers, each with the index of its first one."""
        descriptor = open_regular(self.path)
        try:
            size = math.prod(self.shape) * self.dtype.itemsize
            for position in range(0, size, READ_BYTES):
                data = read_exactly(descriptor, self.begin + position, min(READ_BYTES, size - position), self.path)
                yield position // self.dtype.itemsize, torch.frombuffer(bytearray(data), dtype=self.dtype)
        finally:
            os.close(descriptor)

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        whole = torch.empty(math.prod(self.shape), dtype=self.dtype)
        for first, piece in self.pieces():
            whole[first:first + len(piece)] = piece
        return whole.reshape(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        found = json.loads(read_file(Path(os.path.realpath(path)), JSON_LIMIT_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}"[:500]) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Where every tensor of the folder is.

    Raises:
        CheckpointError: there are no safetensors, or files and index are damaged or contradict each other.
    """
    if not os.path.lexists(folder / INDEX_NAME):
        if not os.path.lexists(folder / SINGLE_NAME):
            raise CheckpointError(_without_safetensors(folder))
        return _read_header(folder, SINGLE_NAME)
    placed = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map from tensors to files")
    for file in placed.values():
        if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{folder / INDEX_NAME} names the file {file!r}: it must be the plain name of a "
                                  ".safetensors file in the same folder. Do not use a folder with such an index.")
    found: dict[str, StoredTensor] = {}
    problems = []
    for file in sorted(set(placed.values())):
        for name, tensor in _read_header(folder, file).items():
            if placed.get(name) != file:
                problems.append(f"{file} holds {name}, which the index places in {placed.get(name, 'no file')}")
            found[name] = tensor
    problems += [f"{file} does not hold {name}, which the index places there" for name, file in placed.items()
                 if name not in found]
    raise_problems(f"{folder / INDEX_NAME} does not fit its files", problems)
    return found


def _without_safetensors(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        return f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}. Name the folder of a Hugging Face model."
    return (f"{folder} holds its weights as {pickles[0]}, which can run any code when it is loaded; only safetensors "
            "are read. Get the model's .safetensors files, or, if you trust the file, convert it where that does no "
            "harm: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR) of transformers writes safetensors.")


def _read_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    path = Path(os.path.realpath(folder / file))
    descriptor = open_regular(path)
    try:
        file_bytes = os.fstat(descriptor).st_size
        length = int.from_bytes(read_exactly(descriptor, 0, 8, path), "little")
        if length > min(HEADER_LIMIT_BYTES, file_bytes - 8):
            raise CheckpointError(f"{path} claims a header of {length} bytes in a file of {file_bytes}")
        header = read_exactly(descriptor, 8, length, path)
    finally:
        os.close(descriptor)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return _placed(path, entries, 8 + length, file_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header: {type(error).__name__}: {error}"[:500]) from error


def _placed(path: Path, entries: dict[str, Any], data_start: int, file_bytes: int) -> dict[str, StoredTensor]:
    """The tensors of a file, whose bytes must cover it without gaps or overlap."""
    found: dict[str, StoredTensor] = {}
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in DTYPE_OF or not all(type(x) is int and 0 <= x < 1 << 48 for x in shape):
            raise ValueError(f"{name} has shape {shape} and dtype {entry['dtype']!r}")
        dtype = DTYPE_OF[entry["dtype"]]
        if data_start + begin != position or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of shape {shape} claims the bytes [{begin}, {end})")
        found[name] = StoredTensor(path, dtype, shape, position)
        position = data_start + end
    if position != file_bytes:
        raise ValueError(f"the file has {file_bytes} bytes, its header describes {position}")
    return found
