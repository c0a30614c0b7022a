"""Reads whole tensors of a checkpoint one at a time, whatever layout wrote them, and writes a checkpoint that way.

For what is no training run: memory is bounded by the largest tensor, and there is one process.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.durable import (
    READ_BYTES,
    NewFile,
    fsync_folder,
    make_folder,
    open_regular,
    read_exactly,
    remove_folder,
    rename_folder,
)
from megatron_ltd.checkpoint.layout import checkpoint_path, holds_nothing, partial_path, write_tracker
from megatron_ltd.checkpoint.manifest import Manifest, TensorFacts, versions, write_manifest
from megatron_ltd.checkpoint.tensor_file import DTYPE_OF, NAME_OF, Chunk, StoredChunk, encode_header, read_header
from megatron_ltd.checkpoint.verify import all_finite, verify_files
from megatron_ltd.errors import CheckpointError

FILE_NAME = "rank-00000.safetensors"


class CheckpointTensors:
    """The tensors of a checkpoint, verified.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        contents = verify_files(path, manifest, None)
        raise_problems(f"{path} cannot be used",
                       [f"{name} has NaN or infinity in it" for name in sorted(contents.not_finite)])
        self._places: dict[str, list[tuple[Path, StoredChunk]]] = {}
        for file in sorted(manifest.files):
            descriptor = open_regular(path / file)
            try:
                for stored in read_header(descriptor, os.fstat(descriptor).st_size, path / file):
                    self._places.setdefault(stored.chunk.name, []).append((path / file, stored))
            finally:
                os.close(descriptor)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, by the name under which it is wanted."""
        stored_name = self.manifest.stored_name(name)
        if stored_name is None:
            raise CheckpointError(f"{self.path} holds no {name}")
        facts = self.manifest.tensors[stored_name]
        whole = torch.empty(facts.shape, dtype=DTYPE_OF[facts.dtype])
        for file, stored in self._places.get(stored_name, []):
            chunk = stored.chunk
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.shape, strict=True))
            _read_into(whole[box], file, stored)
        return whole


def _read_into(target: torch.Tensor, path: Path, stored: StoredChunk) -> None:
    """Fill a box of a tensor from a chunk, some rows at a time."""
    if target.numel() == 0:
        return
    rows = target if target.ndim else target[None]
    row_bytes = (stored.end - stored.begin) // len(rows)
    at_once = max(1, READ_BYTES // max(1, row_bytes))
    descriptor = open_regular(path)
    try:
        for first in range(0, len(rows), at_once):
            part = rows[first:first + at_once]
            data = read_exactly(descriptor, stored.begin + first * row_bytes, len(part) * row_bytes, path)
            part.copy_(torch.frombuffer(bytearray(data), dtype=target.dtype).view(part.shape))
    finally:
        os.close(descriptor)


def write_checkpoint(save_dir: Path, step: int, facts: Mapping[str, TensorFacts],
                     tensors: Iterable[tuple[str, torch.Tensor]], *, config: dict[str, Any],
                     counters: dict[str, Any]) -> Path:
    """Write a checkpoint of tensors that come one at a time, in the order of `facts`, and make it the newest.

    Raises:
        CheckpointError: the folder holds checkpoints already, a tensor is not as announced or not finite, or writing
            failed; nothing is left behind.
    """
    if not holds_nothing(save_dir):
        raise CheckpointError(f"--save = {save_dir} holds a checkpoint already. Name a new or empty folder.")
    partial = partial_path(save_dir, step)
    try:
        make_folder(save_dir)
        if os.path.lexists(partial):
            remove_folder(partial)
        os.mkdir(partial)
        fsync_folder(save_dir)
        try:
            chunks = [Chunk(name, fact.dtype, fact.shape, (0,) * len(fact.shape)) for name, fact in facts.items()]
            files = {FILE_NAME: _write_file(partial / FILE_NAME, chunks, tensors)}
            write_manifest(partial, Manifest(step=step, config=config, counters=counters, tensors=dict(facts),
                                             aliases={}, files=files, versions=versions()))
            rename_folder(partial, checkpoint_path(save_dir, step))
        except BaseException:
            remove_folder(partial)
            raise
        write_tracker(save_dir, step)
    except OSError as error:
        raise CheckpointError(f"--save = {save_dir} cannot be written: {error}") from error
    return checkpoint_path(save_dir, step)


def _write_file(path: Path, chunks: list[Chunk], tensors: Iterable[tuple[str, torch.Tensor]]) -> Any:
    with NewFile(path) as file:
        file.write(encode_header(chunks))
        for chunk, (name, values) in zip(chunks, tensors, strict=True):
            if (name, tuple(values.shape), NAME_OF[values.dtype]) != (chunk.name, chunk.shape, chunk.dtype):
                raise ValueError(f"{name} is {values.dtype} {tuple(values.shape)}, announced {chunk}")
            if not all_finite(values):
                raise CheckpointError(f"{name} has NaN or infinity in it; it would not load")
            write_values(file, values)
        return file.finish()


def write_values(file: NewFile, values: torch.Tensor) -> None:
    """The bytes of a tensor, some at a time where that saves a copy."""
    file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
