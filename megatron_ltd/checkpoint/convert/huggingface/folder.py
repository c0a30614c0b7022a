"""Reads a Hugging Face model folder: config.json and safetensors files, tensor by tensor.

Nothing in the folder is executed or unpickled. File names come from its index and are names, never paths. The files
themselves may be links, as a download cache makes them.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.durable import open_regular, read_file
from megatron_ltd.checkpoint.manifest import FILE_NAME
from megatron_ltd.errors import CheckpointError

CONFIG_NAME, INDEX_NAME, SINGLE_NAME = "config.json", "model.safetensors.index.json", "model.safetensors"
JSON_LIMIT_BYTES = 1 << 26
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; the dtype by its name in safetensors, such as F32."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The values; the file is opened for this tensor alone, so that memory holds no others of it."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


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
    if os.path.lexists(folder / SINGLE_NAME) and SINGLE_NAME not in placed.values():
        if not any(os.path.lexists(folder / file) for file in placed.values()):
            return _read_header(folder, SINGLE_NAME)  # `save_pretrained` leaves the index of an earlier save
        raise CheckpointError(f"{folder} holds the model twice: as {SINGLE_NAME}, and as {INDEX_NAME} with its files; "
                              "one may be left from an earlier save. Move away the one that is not to be read.")
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
    """The tensors of a file. The library checks that they cover it without gaps or overlap."""
    path = Path(os.path.realpath(folder / file))
    open_regular(path).close()
    try:
        with safe_open(path, framework="pt") as stored:
            pieces = {name: stored.get_slice(name) for name in stored.keys()}
            return {name: StoredTensor(path, name, piece.get_dtype(), tuple(piece.get_shape()))
                    for name, piece in pieces.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}"[:500]) from error
