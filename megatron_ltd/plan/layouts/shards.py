"""How many numbers of the model's parameters a process holds before data-parallel sharding."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.shapes import NGRAMS, layer_matrices, parameter_shapes

SHARDED = ("attention.qkv", "attention.conv", "attention.proj.weight", "mlp.fc1", "mlp.gate", "mlp.up",
           "mlp.fc2.weight", "embedding.word.weight", NGRAMS, "head.weight", "lm_head.bias")
"""Parameters that tensor-parallel processes share; the others are whole on each."""


class Shards(NamedTuple):
    """Numbers of parameters of a tensor-parallel process: of each layer, and of what is outside the layers.

    Args:
        embedding: of the first stage.
        head: of the last, without a tied word embedding.
        word: of the word embedding, which is also the output embedding if they are tied.
        matrices: of a layer's matrices, which Muon updates.
        ngram: of the table of n-grams.
    """

    layer: int
    embedding: int
    head: int
    word: int
    tied: bool
    matrices: int = 0
    ngram: int = 0

    @classmethod
    @lru_cache(maxsize=64)  # noqa: B019  no instance is kept
    def of(cls, model: ModelConfig, tp: int) -> "Shards":
        counts = {"layer": 0, "embedding": 0, "head": 0}
        tables, matrices, known = {"embedding.word.weight": 0, NGRAMS: 0}, 0, layer_matrices(model)
        for name, shape in parameter_shapes(replace(model, num_layers=1)).items():
            mine = prod(shape) // (tp if _is_sharded(name, model) else 1)
            tables |= {name: mine} if name in tables else {}
            group = "layer" if name.startswith("layers.") else "embedding" if name.startswith("embedding.") else "head"
            counts[group] += mine
            matrices += mine if name.removeprefix("layers.0.") in known else 0
        word, ngram = tables.values()
        return cls(**counts, word=word, matrices=matrices, ngram=ngram, tied=model.tied and model.family != "vit")

    def outside_layers(self, first: bool, last: bool) -> int:
        """Those of a stage besides its layers."""
        copy = self.word if last and self.tied and not first else 0
        return (self.embedding if first else 0) + (self.head + copy if last else 0)

    def of_stages(self, stages: Sequence[tuple[int, int]], layers: int) -> int:
        """Those of several stages, given by first layer and end, of a model of so many layers."""
        return sum((stop - first) * self.layer + self.outside_layers(first == 0, stop == layers)
                   for first, stop in stages)


def _is_sharded(name: str, model: ModelConfig) -> bool:
    if model.qk_layernorm_all_heads and name.endswith(("query_norm.weight", "key_norm.weight")):
        return True
    if name in SHARDED[7:]:
        return True
    return name.startswith("layers.") and any(f".{part}" in name for part in SHARDED[:7])
