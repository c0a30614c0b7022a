"""One safetensors file of a checkpoint: a JSON header, then the bytes of the tensors' chunks back to back.

    [8 bytes: header length n][n bytes: JSON][chunk][chunk]...

A chunk is the part of a global tensor that one rank holds. Its place in the global tensor stands in the header's
metadata under the key that torch.distributed.checkpoint uses, so that torch's own reader understands the file.
https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.durable import read_exactly
from megatron_ltd.errors import CheckpointError

SHARDING_KEY = "DCP_SHARDING_INFO"
HEADER_LIMIT_BYTES = 100_000_000
"""The largest header that safetensors accepts."""

DTYPE_OF = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}
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


@dataclass(frozen=True)
class StoredChunk:
    """A chunk and the bytes [begin, end) of its file."""

    chunk: Chunk
    begin: int
    end: int


def encode_header(chunks: list[Chunk]) -> bytes:
    """The header of a file that holds these chunks in this order; names must differ."""
    sharding = {chunk.name: {"saved_offsets": list(chunk.offsets)} for chunk in chunks}
    metadata = {SHARDING_KEY: json.dumps(sharding), "DCP_VERSION": "1.0", "format": "pt"}
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for chunk in chunks:
        end = position + chunk.size_bytes
        header[chunk.name] = {"dtype": chunk.dtype, "shape": list(chunk.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def read_header(descriptor: int, file_bytes: int, path: Path) -> list[StoredChunk]:
    """The chunks of a file in order of their bytes.

    Raises:
        CheckpointError: the header is not that of a checkpoint's safetensors file, or does not describe exactly
            the bytes that follow it.
    """
    if file_bytes < 8:
        raise CheckpointError(f"{path} has {file_bytes} bytes, too few for a safetensors file")
    length = int.from_bytes(read_exactly(descriptor, 0, 8, path), "little")
    if length > min(HEADER_LIMIT_BYTES, file_bytes - 8):
        raise CheckpointError(f"{path} claims a header of {length} bytes in a file of {file_bytes}")
    try:
        header = json.loads(read_exactly(descriptor, 8, length, path))
        sharding = json.loads(header.pop("__metadata__")[SHARDING_KEY])
        stored = [_stored_chunk(name, entry, sharding[name], 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header: {type(error).__name__}: {error}"[:500]) from error
    stored.sort(key=lambda item: (item.begin, item.end))
    position = 8 + length
    for item in stored:
        if item.begin != position:
            raise CheckpointError(f"{path}: the bytes of {item.chunk.name} begin at {item.begin}, not {position}")
        position = item.end
    if position != file_bytes:
        raise CheckpointError(f"{path} has {file_bytes} bytes, but its header describes {position}")
    return stored


def _stored_chunk(name: str, entry: dict[str, Any], sharding: dict[str, Any], data_start: int) -> StoredChunk:
    shape, offsets, (begin, end) = entry["shape"], sharding["saved_offsets"], entry["data_offsets"]
    if entry["dtype"] not in DTYPE_OF:
        raise ValueError(f"{name} has dtype {entry['dtype']}")
    if len(shape) != len(offsets) or not all(type(x) is int and 0 <= x < 1 << 48 for x in [*shape, *offsets]):
        raise ValueError(f"{name} has shape {shape} at {offsets}")
    chunk = Chunk(name, entry["dtype"], tuple(shape), tuple(offsets))
    if type(begin) is not int or type(end) is not int or begin < 0 or end - begin != chunk.size_bytes:
        raise ValueError(f"{name} has {chunk.size_bytes} bytes, but the header says [{begin}, {end})")
    return StoredChunk(chunk, data_start + begin, data_start + end)
