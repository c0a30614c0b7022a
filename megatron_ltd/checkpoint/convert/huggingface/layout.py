"""How one of our tensors holds one or several of theirs, as views into it.

Theirs are copied into the views on the way in and out of them on the way out, so that one description serves both
directions and neither needs a second copy of a tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Part = tuple[torch.Tensor, tuple[int, ...]]
"""A view into our tensor, and the shape in which its numbers are stored on the other side."""

Layout = Callable[[torch.Tensor], list[Part]]


@dataclass(frozen=True)
class Mapped:
    """One of our tensors and what it is made of.

    Args:
        ours: global name.
        shape: of the whole tensor.
        theirs: names of the parts, in the order of the layout.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    layout: Layout

    def parts(self, whole: torch.Tensor) -> dict[str, Part]:
        """The parts of our tensor by their names."""
        return dict(zip(self.theirs, self.layout(whole), strict=True))

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self.parts(torch.empty(self.shape, device="meta")).items()}


def same(whole: torch.Tensor) -> list[Part]:
    return [(whole, tuple(whole.shape))]


def transposed(whole: torch.Tensor) -> list[Part]:
    """[in, out] on the other side, as GPT-2 keeps its matrices; a vector is a vector."""
    return [(whole.t(), tuple(whole.shape)[::-1])]


def shaped(*shape: int) -> Layout:
    """The same numbers in another shape."""

    def layout(whole: torch.Tensor) -> list[Part]:
        return [(whole, shape)]

    return layout


def rows(count: int) -> Layout:
    """The first `count` rows: a vocabulary without its padding."""

    def layout(whole: torch.Tensor) -> list[Part]:
        return [(whole[:count], (count, *whole.shape[1:]))]

    return layout


def separate_qkv(groups: int, queries_per_group: int, head_dim: int) -> Layout:
    """Query, key and value apart, where ours are together for each key/value head: [g, (n/g + 2), d]."""

    def layout(whole: torch.Tensor) -> list[Part]:
        heads = whole.unflatten(0, (groups, queries_per_group + 2, head_dim))
        return [(part, (groups * part.shape[1] * head_dim, *whole.shape[1:]))
                for part in heads.split((queries_per_group, 1, 1), dim=1)]

    return layout


def fused_transposed_qkv(heads: int, head_dim: int) -> Layout:
    """[in, 3 n d] with all queries first, as GPT-2's c_attn; a bias is [3 n d]."""

    def layout(whole: torch.Tensor) -> list[Part]:
        by_kind = whole.unflatten(0, (heads, 3, head_dim)).transpose(0, 1)  # [3, n, d, ...]
        width = 3 * heads * head_dim
        if whole.ndim == 1:
            return [(by_kind, (width,))]
        return [(by_kind.permute(3, 0, 1, 2), (whole.shape[1], width))]

    return layout
