"""Adapts the weights of a checkpoint to another model: a ViT's positions to another resolution and its classifier to
other classes, a vocabulary to more tokens, and a model without a table of n-grams or convolutions to one with them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_ltd.checkpoint.manifest import Manifest
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.parts import PARTS
from megatron_ltd.model.arithmetic.shapes import VOCABULARY, parameter_shapes
from megatron_ltd.model.vit import CLASSIFIER, POSITIONS, resized_positions

FREE = frozenset({"img_h", "img_w", "num_classes"})
"""Settings in which two ViTs may differ."""
FREE_WITH_VOCABULARY = frozenset({"vocab_size", "make_vocab_size_divisible_by"})
"""Settings in which two models may differ of which one has more tokens."""


@dataclass
class Adaptation:
    """The tensors of a checkpoint that are not loaded unchanged.

    Args:
        shapes: saved tensors that are read separately from the model, by global name.
        grids: patch grids of the saved model and of this one.
        known, tokens: tokens of the saved model's tokenizer and of this run's.
        new: parameters that the saved model does not have, which keep their initial values.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    grids: tuple[tuple[int, int], tuple[int, int]] | None = None
    known: int = 0
    tokens: int = 0
    new: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.read = {name: torch.empty(shape) for name, shape in self.shapes.items()}

    @torch.no_grad()
    def finish(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Fill in what was read separately; a classifier of other classes keeps its initial values."""
        for name, parameter in parameters:
            if name not in self.read or name in CLASSIFIER:
                continue
            assert isinstance(parameter, DTensor)
            if name == POSITIONS and self.grids is not None:
                whole = resized_positions(self.read[name], *self.grids)
            else:
                whole = grown_vocabulary(self.read[name], parameter.shape, self.known, self.tokens)
            whole = whole.to(parameter.device)
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))

    def describe(self) -> str:
        parts = [f"positions of {self.grids[0][0]} x {self.grids[0][1]} patches interpolated to "
                 f"{self.grids[1][0]} x {self.grids[1][1]}"] if self.grids else []
        parts += ["the classifier is reinitialised"] if CLASSIFIER[0] in self.shapes else []
        parts += [f"vocabulary: the rows of tokens {self.known} to {self.tokens - 1} are new and start at the mean of "
                  f"the {self.known} others"] if self.tokens else []
        parts += [f"new, and zero at first: {part.name}" for part in PARTS
                  if any(name.endswith(part.parameter) for name in self.new)]
        return "; ".join(parts)


def grown_vocabulary(saved: torch.Tensor, shape: tuple[int, ...], known: int, tokens: int) -> torch.Tensor:
    """A table with the saved rows in which those of the tokens from `known` on are the mean of the others."""
    whole = saved.new_zeros(shape)
    rows = min(len(saved), len(whole))
    whole[:rows] = saved[:rows]
    whole[known:tokens] = saved[:known].double().mean(0).to(saved.dtype)
    return whole


def adaptation(model: ModelConfig, manifest: Manifest, saved: ModelConfig, *, known: int = 0, tokens: int = 0
               ) -> Adaptation:
    """What must be adapted to start this model from the weights of a saved one.

    Args:
        known, tokens: tokens of the saved model's tokenizer and of this run's.
    """
    if model.family != "vit":
        grown = known < tokens
        names = [name for name in VOCABULARY if grown and name in parameter_shapes(model)]
        new = frozenset(name for part in PARTS if part.is_new(vars(saved), vars(model))
                        for name in parameter_shapes(model) if name.endswith(part.parameter))
        return Adaptation(_shapes(manifest, names), known=known, tokens=tokens if grown else 0, new=new)
    names = list(CLASSIFIER) if saved.num_classes != model.num_classes else []
    grids = None
    if saved.grid != model.grid:
        names.append(POSITIONS)
        grids = saved.grid, model.grid
    return Adaptation(_shapes(manifest, names), grids)


def _shapes(manifest: Manifest, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    facts: dict[str, Any] = {name: manifest.tensors[f"model.{name}"] for name in names
                             if f"model.{name}" in manifest.tensors}
    return {name: tuple(fact.shape) for name, fact in facts.items()}
