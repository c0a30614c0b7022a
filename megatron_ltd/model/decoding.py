"""GPT that generates text token by token, with a key/value cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.attention.context import biased
from megatron_ltd.model.attention.convolution import Reading, reading_of
from megatron_ltd.model.attention.layer import KeyValueCache, TokenContext
from megatron_ltd.model.attention.rotary import rotary_angles
from megatron_ltd.model.gpt import GPT
from megatron_ltd.model.ngrams import NONE, NGrams, ngrams_of
from megatron_ltd.parallel.layers import local


class DecodeState:
    """A stage's state for a batch of texts, which are left-padded.

    `length` is the number of tokens read of each text, padding included; the caller of the stages increases it.

    Args:
        layers: global ids of the stage's layers.
        padding: number of padding tokens of each text.
        capacity: maximum number of tokens in each text.

    Shapes:
        padding [b] int64
    """

    def __init__(self, layers: Sequence[int], padding: torch.Tensor, capacity: int):
        self.padding, self.length = padding, 0
        self.caches = {layer: KeyValueCache(capacity) for layer in layers}
        self._latest: torch.Tensor | None = None
        self._chosen: dict[int, torch.Tensor] = {}

    def ngrams(self, tokens: torch.Tensor, config: ModelConfig) -> NGrams | None:
        """The n-grams of the tokens read now. Shapes: [b, s]"""
        earlier = config.ngram_length - 1
        before = tokens.new_full((tokens.shape[0], earlier), NONE) if self._latest is None else self._latest
        places = torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)
        tokens = tokens.masked_fill(places < self.padding[:, None], NONE)
        self._latest = torch.cat((before, tokens), dim=1)[:, -earlier:]
        return ngrams_of(tokens, config, before=before)

    def chosen_so_far(self, layer: int, chosen: torch.Tensor) -> torch.Tensor:
        """Which tokens a layer's router has chosen, with those read now. Shapes: [b, s] -> [b, all]"""
        earlier = self._chosen.get(layer, chosen[:, :0])
        self._chosen[layer] = torch.cat((earlier, chosen), dim=1)
        return self._chosen[layer]


class DecodingGPT(GPT):
    """A stage that, given a state, reads further tokens and returns the logits of the next one.

    Shapes:
        x: tokens [b, s] on the first stage, hidden states [s, b, h] on the others
        -> hidden states; on the last stage logits [b, v] fp32
    """

    def forward(self, x: torch.Tensor, *, state: DecodeState | None = None, **batch: Any) -> torch.Tensor:
        return super().forward(x, **batch) if state is None else self._read(x, state)

    def _read(self, x: torch.Tensor, state: DecodeState) -> torch.Tensor:
        count = x.shape[0] if self.embedding is None else x.shape[1]
        places = torch.arange(state.length, state.length + count, device=x.device)
        positions = (places[:, None] - state.padding).clamp(min=0)  # [s, b]
        if self.embedding is not None:
            x = self.embedding(x, positions, None, ngrams=state.ngrams(x, self.config))
        tokens = self._tokens(places, positions, state.padding)
        for name, block in self.stack.blocks.items():
            layer = int(name)
            of_layer = replace(tokens.for_layer(self.config, layer), cache=state.caches[layer])
            router = self.stack.router(layer)
            if router is None:
                x = x + block(x, of_layer)
            else:
                scores, chosen = router.predict(x)
                x = x + scores[..., None] * block(x, of_layer.seeing_only(state.chosen_so_far(layer, chosen)))
        if self.final_norm is None:
            return x
        hidden = self.tp.enter(self.final_hidden(x[-1:]))[0]  # [b, h]
        known = hidden @ local(self.output_weight()).narrow(0, 0, self.vocab.valid).t()
        assert self.config.vocab_size is not None
        logits = torch.zeros(hidden.shape[0], self.config.vocab_size, device=x.device)
        logits[:, self.vocab.first:self.vocab.first + self.vocab.valid] = known
        return self.vocab.reduce(logits)

    def _tokens(self, places: torch.Tensor, positions: torch.Tensor, padding: torch.Tensor) -> TokenContext:
        """Shapes: places [s], positions [s, b], padding [b]"""
        angles = None
        if self.config.position_embedding_type == "rope":
            angles = rotary_angles(positions, self.config, int(positions.max()) + 1)
        mask, window = self._mask(places, padding), None
        if self.config.window_size is not None:
            keys = torch.arange(mask.shape[-1], device=places.device)
            window = mask & (keys >= places[:, None] - self.config.window_size[0])
        if self.config.position_embedding_type == "alibi":
            keys = torch.arange(mask.shape[-1], device=places.device)[None]
            mask = biased(mask, places[None], keys, self.config, self.tp)
            window = None if window is None else biased(window, places[None], keys, self.config, self.tp)
        return TokenContext(angles=angles, mask=mask, window_mask=window, reading=self._reading(places, padding))

    def _reading(self, places: torch.Tensor, padding: torch.Tensor) -> Reading | None:
        """What a convolution reads, of rows of which the first are those of tokens before. Padding is what other texts
        are: another document.

        Shapes:
            places [s], padding [b]
        """
        if self.config.qkv_conv_kernel is None:
            return None
        reach = self.config.qkv_conv_kernel - 1
        rows = torch.arange(int(places[0]) - reach, int(places[-1]) + 1, device=places.device)[:, None]
        return reading_of(rows, reach, (rows >= padding).to(torch.int64), gaps=False)

    def _mask(self, places: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """Mask of earlier tokens that are not padding, and of the token itself, since a softmax over nothing is NaN.

        Shapes:
            places [s], padding [b] -> [b, 1, s, c]
        """
        keys = torch.arange(int(places[-1]) + 1, device=places.device)
        earlier = (keys <= places[:, None]) & (keys >= padding[:, None, None])
        return (earlier | (keys == places[:, None]))[:, None]
