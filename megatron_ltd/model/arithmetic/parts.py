"""What a model may be given that was trained without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ltd.model.arithmetic.shapes import CONVOLUTION, NGRAMS


@dataclass(frozen=True)
class Part:
    """It starts as zeros, with which it changes nothing.

    Args:
        free: settings in which the two models may differ then; the first says whether a model has it.
        parameter: how the names of its parameters end.
    """

    name: str
    free: tuple[str, ...]
    parameter: str

    def is_new(self, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
        """Whether this model has it and the saved one has not, by their settings."""
        return saved.get(self.free[0]) is None and mine[self.free[0]] is not None


PARTS = (Part("table of n-grams", ("ngram_rows", "ngram_length"), NGRAMS),
         Part("convolutions", ("qkv_conv_kernel",), CONVOLUTION))
