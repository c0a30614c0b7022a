"""What travels with the tokens of a microbatch: positions, documents, and the keys of their dropout masks.

A layer that keeps some tokens gets the facts of just those, gathered with the same indices: rotary angles are those of
the true positions, and attention never crosses a document boundary that the dropped tokens hid.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_ltd.config import ModelConfig
from megatron_ltd.model.attention import TokenFacts
from megatron_ltd.model.dropout import token_keys
from megatron_ltd.model.rotary import rotary_angles
from megatron_ltd.parallel.collectives import TensorParallel

_ATTENTION, _AFTER_ATTENTION, _AFTER_MLP = range(3)
EMBEDDING_LAYER = 1 << 20
"""Layer number under which the embedding's dropout draws, out of the way of the layers'."""


@dataclass(frozen=True)
class SampleFacts:
    """The facts of a whole microbatch.

    Args:
        config: the model's settings.
        tp: the axis over which the sequence may be sliced.
        seed: of dropout.
        training: dropout draws.
        sample_ids: global sample indices.
        position_ids: positions that count from the start of each document; None counts from the start of the sample.
        document_ids: which document each token belongs to; None allows attention over the whole sample.
        padding_mask: which tokens are real; None: all.
        kept: positions that all dropped layers keep, ascending; None where each layer draws its own.

    Shapes:
        sample_ids [b], position_ids, document_ids and padding_mask [b, s], kept [b, k]
    """

    config: ModelConfig
    tp: TensorParallel
    seed: int
    training: bool
    sequence_tokens: int
    sample_ids: torch.Tensor
    position_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def positions(self) -> torch.Tensor:
        """Shapes: [s, b], or [s, 1] where all samples agree"""
        if self.position_ids is not None:
            return self.position_ids.t()
        return torch.arange(self.sequence_tokens, device=self.sample_ids.device)[:, None]

    def embedding_keys(self) -> torch.Tensor | None:
        """Dropout keys of the embedding. Shapes: [s/t or s, b]"""
        places = torch.arange(self.sequence_tokens, device=self.sample_ids.device)[:, None]
        return self._hidden_keys(EMBEDDING_LAYER, _AFTER_MLP, places)

    def for_layer(self, layer: int, kept: torch.Tensor | None = None, *, cross: bool = False) -> TokenFacts:
        """The facts of the tokens that `layer` processes: all, or the kept ones.

        Args:
            cross: the layer's keys and values are those of all tokens.

        Shapes:
            kept [b, k] ascending
        """
        everywhere = torch.arange(self.sequence_tokens, device=self.sample_ids.device)[:, None]
        places = everywhere if kept is None else kept.t()  # [k, b or 1]
        first, second = (self._hidden_keys(layer, site, places) for site in (_AFTER_ATTENTION, _AFTER_MLP))
        return TokenFacts(
            causal=self.config.family == "gpt", angles=self._angles(kept),
            key_angles=self._angles(None) if cross else None,
            mask=self._causal_mask(kept, cross) if self.config.family == "gpt" else self._padding_mask(kept, cross),
            hidden_keys=None if first is None or second is None else (first, second),
            attention_keys=self._attention_keys(layer, places, everywhere if cross else places))

    @cached_property
    def _all_angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary angles of the whole sequence, computed once for all layers. Shapes: two of [s, b or 1, 1, r / 2]"""
        channels = int(self.config.head_dim * self.config.rotary_percent) // 2 * 2
        return rotary_angles(self.positions(), channels, float(self.config.rotary_base))

    def _angles(self, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.config.position_embedding_type != "rope":
            return None
        if kept is None:
            return self._all_angles
        samples = torch.arange(kept.shape[0], device=kept.device)
        cos, sin = (table.expand(-1, kept.shape[0], -1, -1)[kept.t(), samples] for table in self._all_angles)
        return cos, sin  # [k, b, 1, r / 2]

    def _causal_mask(self, kept: torch.Tensor | None, cross: bool) -> torch.Tensor | None:
        """Earlier tokens of the same document; None where plain causal attention says the same.

        Shapes:
            -> [b or 1, 1, k, c]
        """
        if self.document_ids is None and not cross:
            return None
        everywhere = torch.arange(self.sequence_tokens, device=self.sample_ids.device)[None, :]
        queries = everywhere if kept is None else kept
        keys = everywhere if cross else queries
        mask = queries[:, :, None] >= keys[:, None, :]
        if self.document_ids is not None:
            documents = self.document_ids if kept is None else self.document_ids.gather(1, kept)
            of_keys = self.document_ids if cross else documents
            mask = mask & (documents[:, :, None] == of_keys[:, None, :])
        return mask[:, None]

    def _padding_mask(self, kept: torch.Tensor | None, cross: bool) -> torch.Tensor | None:
        """Real tokens. Where a short sample keeps nothing but padding, padding sees padding: a softmax over nothing is
        not a number, and what comes out is read by nobody.

        Shapes:
            -> [b, 1, 1, c]
        """
        if self.padding_mask is None:
            return None
        real = self.padding_mask if kept is None or cross else self.padding_mask.gather(1, kept)
        return (real | ~real.any(dim=1, keepdim=True))[:, None, None]

    def _hidden_keys(self, layer: int, site: int, places: torch.Tensor) -> torch.Tensor | None:
        if not self.training or self.config.hidden_dropout == 0.0:
            return None
        first, count = self.tp.sequence_span(places.shape[0])
        return token_keys(self.seed, layer, site, self.sample_ids, places[first:first + count])

    def _attention_keys(self, layer: int, places: torch.Tensor, key_places: torch.Tensor,
                        ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.training or self.config.attention_dropout == 0.0:
            return None
        keys = token_keys(self.seed, layer, _ATTENTION, self.sample_ids, places)  # [k, b]
        return keys.t()[:, None, :, None], key_places.t().to(torch.int32)[:, None, None, :]
