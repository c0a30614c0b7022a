"""Adapts the weights of a ViT to another one: interpolated positions for another resolution, a new classifier for other
classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_ltd.checkpoint.manifest import Manifest
from megatron_ltd.config import ModelConfig
from megatron_ltd.model.vit import CLASSIFIER, POSITIONS, resized_positions

FREE = frozenset({"img_h", "img_w", "num_classes"})
"""Settings in which the two models may differ."""


@dataclass
class Adaptation:
    """The tensors of a checkpoint that are not loaded unchanged.

    Args:
        shapes: saved tensors that are read separately from the model, by global name.
        grids: patch grids of the saved model and of this one.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    grids: tuple[tuple[int, int], tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        self.read = {name: torch.empty(shape) for name, shape in self.shapes.items()}

    @torch.no_grad()
    def finish(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Fill in the interpolated positions; the classifier keeps its initial values."""
        if self.grids is None:
            return
        whole, parameter = resized_positions(self.read[POSITIONS], *self.grids), parameters[POSITIONS]
        assert isinstance(parameter, DTensor)
        whole = whole.to(parameter.device)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))

    def describe(self) -> str:
        parts = [f"positions of {self.grids[0][0]} x {self.grids[0][1]} patches interpolated to "
                 f"{self.grids[1][0]} x {self.grids[1][1]}"] if self.grids else []
        return "; ".join(parts + (["the classifier is reinitialised"] if CLASSIFIER[0] in self.shapes else []))


def adaptation(model: ModelConfig, manifest: Manifest, saved: ModelConfig) -> Adaptation:
    """What must be adapted to start this model from the weights of a saved ViT."""
    names = list(CLASSIFIER) if saved.num_classes != model.num_classes else []
    grids = None
    if saved.grid != model.grid:
        names.append(POSITIONS)
        grids = saved.grid, model.grid
    facts: dict[str, Any] = {name: manifest.tensors[f"model.{name}"] for name in names if f"model.{name}" in
                             manifest.tensors}
    return Adaptation({name: tuple(fact.shape) for name, fact in facts.items()}, grids)
