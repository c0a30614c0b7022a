"""One safetensors file of a checkpoint: a JSON header, then the bytes of the tensors' chunks back to back.

    [8 bytes: header length n][n bytes: JSON][chunk][chunk]...

A chunk is the part of a global tensor that one rank holds. Its place in the global tensor stands in the header's
metadata under the key that torch.distributed.checkpoint uses, so that torch's own reader understands the file.
https://huggingface.co/docs/safetensors/index#format

The library `safetensors` reads and checks headers. Its writer is not used: it wants all tensors of a file in memory.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ltd.checkpoint.durable import FileFacts, NewFile
from megatron_ltd.checkpoint.manifest import DTYPES
from megatron_ltd.errors import CheckpointError

SHARDING_KEY = "DCP_SHARDING_INFO"

DTYPE_OF: dict[str, torch.dtype] = {name: getattr(torch, kind) for name, kind in DTYPES.items()}
NAME_OF = {dtype: name for name, dtype in DTYPE_OF.items()}


@dataclass(frozen=True)
class Chunk:
    """A box of a global tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """Where the box begins in each dim of the global tensor."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_OF[self.dtype].itemsize


def whole_chunk(name: str, dtype: str, shape: tuple[int, ...]) -> Chunk:
    """A tensor in one piece."""
    return Chunk(name, dtype, shape, (0,) * len(shape))


def write_tensors(path: Path, chunks: Sequence[Chunk], values: Iterable[torch.Tensor], *,
                  placed: bool = True) -> FileFacts:
    """Write a file of tensors that come one at a time, in the order of `chunks`.

    Args:
        placed: say where each chunk lies in its global tensor.

    Raises:
        CheckpointError: a tensor is not finite.
    """
    with NewFile(path) as file:
        file.write(encode_header(chunks, placed=placed))
        for chunk, tensor in zip(chunks, values, strict=True):
            tensor = tensor.detach().to("cpu").contiguous()
            if tuple(tensor.shape) != chunk.shape or tensor.dtype != DTYPE_OF[chunk.dtype]:
                raise ValueError(f"{chunk.name} is {tensor.dtype} {tuple(tensor.shape)}, planned {chunk}")
            if not all_finite(tensor):
                raise CheckpointError(f"{chunk.name} has NaN or infinity in it; it would not load")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return file.finish()


def all_finite(values: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity in it."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low) and math.isfinite(high)


def encode_header(chunks: Sequence[Chunk], *, placed: bool = True) -> bytes:
    """The header of a file that holds these chunks in this order; names must differ."""
    metadata = {"format": "pt"}
    if placed:
        sharding = {chunk.name: {"saved_offsets": list(chunk.offsets)} for chunk in chunks}
        metadata = {SHARDING_KEY: json.dumps(sharding), "DCP_VERSION": "1.0", **metadata}
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for chunk in chunks:
        end = position + chunk.size_bytes
        header[chunk.name] = {"dtype": chunk.dtype, "shape": list(chunk.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def read_header(path: Path) -> list[Chunk]:
    """The chunks of a file in the order of their bytes, which end where the file ends.

    Raises:
        CheckpointError: the header is not that of a checkpoint's safetensors file, or does not describe exactly
            the bytes that follow it.
    """
    try:
        with safe_open(path, framework="np"):
            pass  # opening checks sizes and types, and that the tensors cover the file without gaps or overlap
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        sharding = json.loads(header.pop("__metadata__")[SHARDING_KEY])
        chunks = [Chunk(name, entry["dtype"], tuple(entry["shape"]), tuple(sharding[name]["saved_offsets"]))
                  for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])]
        for chunk in chunks:
            if len(chunk.shape) != len(chunk.offsets) or not all(type(x) is int and x >= 0 for x in chunk.offsets):
                raise ValueError(f"{chunk.name} has shape {chunk.shape} at {chunk.offsets}")
            if chunk.dtype not in DTYPE_OF:
                raise ValueError(f"{chunk.name} has dtype {chunk.dtype}")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header: {type(error).__name__}: {error}"[:500]) from error
    return chunks
