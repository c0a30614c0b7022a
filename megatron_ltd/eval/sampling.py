"""Choosing the next token from its logits."""

from dataclasses import dataclass

import torch

from megatron_ltd.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: logits are divided by it; 0 always takes the most probable token, the first of equals.
        top_k: draw from the most probable so many; None from all.
        top_p: draw from the most probable that together have at least this probability
            (https://arxiv.org/abs/1904.09751).
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature = {self.temperature}: must be at least 0, which takes the most probable "
                              "token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k = {self.top_k}: must be at least 1; leave it out to draw from all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"--top-p = {self.top_p}: must be above 0 and at most 1, which draws from all tokens")


GREEDY = Sampling()


def next_tokens(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token for each text.

    Args:
        generator: on the CPU, so that every device draws alike.

    Shapes:
        logits [b, v] -> [b] int64 on the CPU
    """
    logits = logits.double().cpu()
    if sampling.temperature == 0.0:
        return logits.argmax(dim=1)
    probabilities, order = (logits / sampling.temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities[:, sampling.top_k:] = 0.0
        probabilities /= probabilities.sum(dim=1, keepdim=True)
    # A token stays while those before it do not have the share yet, so that the first one always does.
    before = probabilities.cumsum(dim=1) - probabilities
    kept = probabilities.where(before < sampling.top_p, 0.0)
    drawn = torch.multinomial(kept, 1, generator=generator)
    return order.gather(1, drawn)[:, 0]
