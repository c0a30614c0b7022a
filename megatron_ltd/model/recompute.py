"""Activations that the backward pass computes again instead of keeping them."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(wanted: bool, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which, if wanted, only the arguments are kept. Computing it again ends as soon as the last
    tensor that the backward pass needs exists: if the function ends with a product, before that product."""
    if not wanted:
        return function(*args)
    # Dropout needs no state of a generator.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
