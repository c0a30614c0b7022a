"""Recomputing in the backward pass what is cheaper to compute again than to keep."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(wanted: bool, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which, if wanted, only the arguments are kept, and the backward pass computes the rest
    again. That ends as soon as the last tensor that the backward pass needs exists: before a product at the end."""
    if not wanted:
        return function(*args)
    # Dropout needs no state of a generator.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
