"""Generates text: chooses the next token from its logits, for several texts at once, on any parallel layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.lm_eval.requests import Finished
from megatron_ltd.model.decoding import DecodeState
from megatron_ltd.train.setup import Model


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


class Decoder:
    """Generates with a model that was built to decode; the processes that share it call it with the same texts.

    Args:
        max_length: positions the model has.
    """

    def __init__(self, model: Model, device: torch.device, max_length: int):
        self.model, self.device, self.max_length = model, device, max_length

    @torch.no_grad()
    def generate(self, texts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling, *, eod: int,
                 finished: Finished = lambda tokens: False) -> list[list[int]]:
        """What follows each text: up to `new_tokens`, or up to the token that ends documents, which is left out.

        A text that leaves no room for so many is cut on the left.

        Raises:
            DataError: a text is empty, or so many tokens are more than the model has positions.
        """
        if not 1 <= new_tokens < self.max_length:
            raise DataError(f"{new_tokens} new tokens do not fit the model's {self.max_length} positions after a text; "
                            f"ask for 1 to {self.max_length - 1}")
        if not all(texts):
            raise DataError("a text has no tokens; begin it with a word")
        rows = [list(text[-(self.max_length - new_tokens):]) for text in texts]
        longest = max(map(len, rows))
        padding = torch.tensor([longest - len(row) for row in rows], device=self.device)
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.device)
        self.model.eval_mode()
        layers = [int(layer) for stage in self.model.stages for layer in stage.stack.blocks]
        state = DecodeState(layers, padding, longest + new_tokens)
        generator = torch.Generator().manual_seed(sampling.seed)
        generated: list[list[int]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        for _ in range(new_tokens):
            chosen = self._next(tokens, state, sampling, generator)
            for i, token in enumerate(chosen.tolist()):
                if i in open_rows and token != eod:
                    generated[i].append(token)
                if i in open_rows and (token == eod or finished(generated[i])):
                    open_rows.remove(i)
            if not open_rows:
                break
            tokens = chosen[:, None]
        self.model.after_evaluation()
        return generated

    def _next(self, tokens: torch.Tensor, state: DecodeState, sampling: Sampling,
              generator: torch.Generator) -> torch.Tensor:
        """Read the tokens and choose one more for each text, on the last stage and for all."""
        pipeline = self.model.pipeline
        with self.model.tp.whole_sequences():  # a single token has no share for each process
            logits = pipeline.forward(tokens, {"state": state}, sliced=False)
        state.length += tokens.shape[1]
        chosen = torch.zeros(tokens.shape[0], dtype=torch.int64, device=self.device)
        if logits is not None:
            chosen.copy_(next_tokens(logits, sampling, generator))
        if pipeline.size > 1:
            dist.broadcast(chosen, group=pipeline.group, group_src=pipeline.last_stage_rank())
        return chosen
