"""What the head does with a chunk of logits, as two passes for a compiler to fuse.

Each pass reads the product of the hidden states with the table once, and the second overwrites it. Without a compiler
they would be slower than the in-place operations of `cross_entropy.py`, since exponentials are computed twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class LogitPasses:
    """`statistics` and `to_gradient`, compiled."""

    statistics: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    to_gradient: Callable[..., None]

    @classmethod
    def compiled(cls) -> "LogitPasses":
        return cls(torch.compile(statistics), torch.compile(to_gradient))


def _logits(product: torch.Tensor, bias: torch.Tensor | None, valid: int) -> torch.Tensor:
    """In fp32, those of the padding at the end as low as can be. Shapes: [c, v/t] -> the same"""
    logits = product.float() if bias is None else product.float() + bias
    columns = torch.arange(product.shape[1], device=product.device)
    return torch.where(columns < valid, logits, _LOWEST)


def statistics(product: torch.Tensor, bias: torch.Tensor | None, row: torch.Tensor,
               valid: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest logit of each token, the sum of the exponentials of logits less the largest, and the logits of the
    labels.

    Args:
        row: of each label.
        valid: rows of the table that are tokens.

    Shapes:
        product [c, v/t], bias [v/t], row [c, k] -> [c, 1], [c, 1], [c, k] in fp32
    """
    logits = _logits(product, bias, valid)
    largest = logits.amax(dim=1, keepdim=True)
    return largest, (logits - largest).exp().sum(dim=1, keepdim=True), logits.gather(1, row)


def to_gradient(product: torch.Tensor, bias: torch.Tensor | None, row: torch.Tensor, valid: int, largest: torch.Tensor,
                factor: torch.Tensor, weight: torch.Tensor) -> None:
    """Overwrite the product with the gradient, exp(logits - largest) factor - weight onehot(row).

    Shapes:
        product [c, v/t], bias [v/t], row and weight [c, k], largest and factor [c, 1]
    """
    gradient = (_logits(product, bias, valid) - largest).exp() * factor
    columns = torch.arange(product.shape[1], device=product.device)
    for label in range(row.shape[1]):
        gradient = gradient - torch.where(columns == row[:, label:label + 1], weight[:, label:label + 1], 0.0)
    product.copy_(gradient)
