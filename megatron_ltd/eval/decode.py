"""Goes on with texts, under tensor and pipeline parallelism, several at once."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ltd.errors import DataError
from megatron_ltd.eval.requests import Finished
from megatron_ltd.eval.sampling import Sampling, next_tokens
from megatron_ltd.model.decoding import DecodeState
from megatron_ltd.train.setup import Model


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
        logits = pipeline.forward(tokens, {"state": state})
        state.length += tokens.shape[1]
        chosen = torch.zeros(tokens.shape[0], dtype=torch.int64, device=self.device)
        if logits is not None:
            chosen.copy_(next_tokens(logits, sampling, generator))
        if pipeline.size > 1:
            dist.broadcast(chosen, group=pipeline.group, group_src=pipeline.last_stage_rank())
        return chosen
