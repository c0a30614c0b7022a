"""Reads whole tensors of a checkpoint one at a time, whatever layout wrote them, and writes a checkpoint that way.

For what is no training run: memory is bounded by the largest tensor, and there is one process.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_ltd.checkpoint.agreement import raise_problems
from megatron_ltd.checkpoint.layout import checkpoint_path, holds_nothing
from megatron_ltd.checkpoint.manifest import Manifest
from megatron_ltd.checkpoint.tensor_file import DTYPE_OF
from megatron_ltd.checkpoint.verify import verify_files
from megatron_ltd.checkpoint.writer import CheckpointWriter
from megatron_ltd.errors import CheckpointError

PREFIX = "model."
"""Of the names of weights in a checkpoint."""


class CheckpointTensors:
    """The tensors of a checkpoint, verified.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.contents = verify_files(path, manifest, None)
        raise_problems(f"{path} cannot be used",
                       [f"{name} has NaN or infinity in it" for name in sorted(self.contents.not_finite)])

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, by its global name."""
        facts = self.manifest.tensors.get(name)
        if facts is None:
            raise CheckpointError(f"{self.path} holds no {name}")
        whole = torch.empty(facts.shape, dtype=DTYPE_OF[facts.dtype])
        for file, chunk in self.contents.chunks.get(name, []):
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.shape, strict=True))
            with safe_open(self.path / file, framework="pt") as stored:  # opened anew, its pages are given back
                whole[box] = stored.get_tensor(name)
        return whole


def check_unused(save_dir: Path) -> None:
    """Make sure that a new checkpoint stands beside no others.

    Raises:
        CheckpointError: the folder holds checkpoints already, or is a file.
    """
    if os.path.lexists(save_dir) and not save_dir.is_dir():
        raise CheckpointError(f"--output = {save_dir} is not a folder. Name a new or empty folder.")
    if not holds_nothing(save_dir):
        raise CheckpointError(f"--output = {save_dir} holds a checkpoint already. Name a new or empty folder.")


def write_weights(save_dir: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], *,
                  config: dict[str, Any], counters: dict[str, Any]) -> Path:
    """Write a model's fp32 weights as the checkpoint of step 0.

    Args:
        shapes: by the model's names.
        read: gives the weights of a name; called for one after the other.

    Raises:
        CheckpointError: the folder holds checkpoints already, a tensor is not finite, or writing failed; nothing is
            left behind.
    """
    check_unused(save_dir)
    tensors = {PREFIX + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    CheckpointWriter(save_dir, None).save(0, tensors, config=config, counters=counters,
                                          read=lambda name: read(name.removeprefix(PREFIX)))
    return checkpoint_path(save_dir, 0)
