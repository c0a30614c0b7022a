"""Checks every byte of a checkpoint's files against its manifest, spread over the ranks.

Rank r of w reads files r, r + w, ... in one pass each: SHA-256, structure, and whether numbers are finite. What the
ranks found out about where each chunk lies is all that loading needs to know, so no header is read twice.
"""

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from megatron_ltd.checkpoint.agreement import gather_json, raise_problems, rank_in, size_of
from megatron_ltd.checkpoint.durable import FileFacts, open_regular
from megatron_ltd.checkpoint.manifest import Manifest
from megatron_ltd.checkpoint.tensor_file import DTYPE_OF, Chunk, all_finite, read_header
from megatron_ltd.errors import CheckpointError, DamagedCheckpointError

READ_BYTES = 16 << 20
"""Size of the pieces in which files are read."""


@dataclass(frozen=True)
class Contents:
    """Where the chunks of a checkpoint's tensors are."""

    chunks: dict[str, list[tuple[str, Chunk]]]
    """Tensor -> (file, chunk), in the order of files."""
    not_finite: frozenset[str]
    """Tensors with NaN or infinity in them."""


def verify_files(checkpoint: Path, manifest: Manifest, group: dist.ProcessGroup | None) -> Contents:
    """Check all files, each on one rank.

    Raises:
        DamagedCheckpointError: on every rank, with every file that is missing, damaged, or not what the manifest says,
            and every tensor that the files do not hold completely.
    """
    names = sorted(manifest.files)
    problems, found = [], []
    for name in names[rank_in(group)::size_of(group)]:
        try:
            chunks, not_finite = verify_file(checkpoint / name, manifest.files[name])
            found.append([name, [astuple(chunk) for chunk in chunks], not_finite])
        except CheckpointError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{checkpoint / name} cannot be read: {error.strerror}")
    if rank_in(group) == 0:
        problems += _unknown_files(checkpoint, manifest)
    answers = gather_json([problems, found], group)
    headline = f"{checkpoint} is damaged and was not loaded (--ckpt-step loads an older one)"
    raise_problems(headline, [problem for rank_problems, _ in answers for problem in rank_problems],
                   DamagedCheckpointError)
    contents = _contents(entry for _, rank_found in answers for entry in rank_found)
    raise_problems(headline, _misfits(contents, manifest), DamagedCheckpointError)
    return contents


def verify_file(path: Path, facts: FileFacts) -> tuple[list[Chunk], list[str]]:
    """Check one file; returns its chunks, and the names of those with NaN or infinity.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes != facts.size_bytes:
            raise CheckpointError(f"{path} has {size_bytes} bytes, expected {facts.size_bytes}")
        malformed = None
        try:
            chunks = read_header(path)
        except CheckpointError as error:
            chunks, malformed = [], error
        found, not_finite = _scan(file, size_bytes, chunks, path)
    if found != facts.sha256:
        raise CheckpointError(f"{path} has SHA-256 {found}, expected {facts.sha256}")
    if malformed is not None:
        raise malformed
    return chunks, not_finite


def _scan(file: BinaryIO, size_bytes: int, chunks: list[Chunk], path: Path) -> tuple[str, list[str]]:
    """SHA-256 of a file, and its chunks that are not finite, in one pass."""
    digest, not_finite = hashlib.sha256(), []
    header_bytes = size_bytes - sum(chunk.size_bytes for chunk in chunks)
    for left, chunk in [(header_bytes, None), *((chunk.size_bytes, chunk) for chunk in chunks)]:
        finite = True
        while left:
            piece = file.read(min(READ_BYTES, left))
            if len(piece) < min(READ_BYTES, left):
                raise CheckpointError(f"{path} ends at byte {file.tell()}; it was cut short while being read")
            left -= len(piece)
            digest.update(piece)
            if chunk is not None and finite:
                finite = all_finite(torch.frombuffer(bytearray(piece), dtype=DTYPE_OF[chunk.dtype]))
        if chunk is not None and not finite:
            not_finite.append(chunk.name)
    return digest.hexdigest(), not_finite


def _unknown_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    extra = [name for name in os.listdir(checkpoint) if name.endswith(".safetensors")]
    return [f"{checkpoint / name} is not in the manifest" for name in sorted(extra) if name not in manifest.files]


def _contents(entries: Iterable[list[Any]]) -> Contents:
    chunks: dict[str, list[tuple[str, Chunk]]] = {}
    not_finite: set[str] = set()
    for file, file_chunks, file_not_finite in sorted(entries, key=lambda entry: str(entry[0])):
        not_finite.update(file_not_finite)
        for name, dtype, shape, offsets in file_chunks:
            chunks.setdefault(name, []).append((file, Chunk(name, dtype, tuple(shape), tuple(offsets))))
    return Contents(chunks, frozenset(not_finite))


def _misfits(contents: Contents, manifest: Manifest) -> list[str]:
    """Tensors of which the files hold less, more, or something else than the manifest says."""
    problems = []
    for name in sorted(manifest.tensors.keys() | contents.chunks.keys()):
        facts, places = manifest.tensors.get(name), contents.chunks.get(name, [])
        if facts is None:
            problems.append(f"{places[0][0]} holds {name}, which is not in the manifest")
            continue
        for file, chunk in places:
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.shape, strict=True)]
            fits = len(ends) == len(facts.shape) and all(e <= s for e, s in zip(ends, facts.shape, strict=True))
            if chunk.dtype != facts.dtype or not fits:
                problems.append(f"{file} holds {chunk.shape} of {name} at {chunk.offsets} as {chunk.dtype}, which "
                                f"is no part of {facts.shape} {facts.dtype}")
        held = [chunk for _, chunk in places if chunk.size_bytes]
        numbers = sum(math.prod(chunk.shape) for chunk in held)
        if numbers != math.prod(facts.shape) or len({chunk.offsets for chunk in held}) != len(held):
            problems.append(f"the files hold {numbers} numbers of {name}, expected {math.prod(facts.shape)}")
    return problems
