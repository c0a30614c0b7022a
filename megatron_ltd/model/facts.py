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

    Shapes:
        sample_ids [b], position_ids and document_ids [b, s]
    """

    config: ModelConfig
    tp: TensorParallel
    seed: int
    training: bool
    sequence_tokens: int
    sample_ids: torch.Tensor
    position_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None

    def positions(self) -> torch.Tensor:
        """Shapes: [s, b], or [s, 1] where all samples agree"""
        if self.position_ids is not None:
            return self.position_ids.t()
        return torch.arange(self.sequence_tokens, device=self.sample_ids.device)[:, None]

    def embedding_keys(self) -> torch.Tensor | None:
        """Dropout keys of the embedding. Shapes: [s/t or s, b]"""
        places = torch.arange(self.sequence_tokens, device=self.sample_ids.device)[:, None]
        return self._hidden_keys(EMBEDDING_LAYER, _AFTER_MLP, places)

    def for_layer(self, layer: int, kept: torch.Tensor | None = None) -> TokenFacts:
        """The facts of the tokens that `layer` processes: all, or the kept ones.

        Shapes:
            kept [b, k] ascending
        """
        places = torch.arange(self.sequence_tokens, device=self.sample_ids.device)[:, None] if kept is None \
            else kept.t()  # [k, b or 1]
        cos, sin = self._angles(kept)
        first, second = (self._hidden_keys(layer, site, places) for site in (_AFTER_ATTENTION, _AFTER_MLP))
        return TokenFacts(cos, sin, self._mask(kept), None if first is None or second is None else (first, second),
                          self._attention_keys(layer, places))

    @cached_property
    def _all_angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary angles of the whole sequence, computed once for all layers. Shapes: two of [s, b or 1, 1, r / 2]"""
        channels = int(self.config.head_dim * self.config.rotary_percent) // 2 * 2
        return rotary_angles(self.positions(), channels, float(self.config.rotary_base))

    def _angles(self, kept: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.config.position_embedding_type != "rope":
            return None, None
        if kept is None:
            return self._all_angles
        samples = torch.arange(kept.shape[0], device=kept.device)
        cos, sin = (table.expand(-1, kept.shape[0], -1, -1)[kept.t(), samples] for table in self._all_angles)
        return cos, sin  # [k, b, 1, r / 2]

    def _mask(self, kept: torch.Tensor | None) -> torch.Tensor | None:
        """Causal within documents. Shapes: [b, 1, k, k]"""
        if self.document_ids is None:
            return None
        documents = self.document_ids if kept is None else self.document_ids.gather(1, kept)
        same = documents[:, :, None] == documents[:, None, :]
        return same.tril()[:, None]

    def _hidden_keys(self, layer: int, site: int, places: torch.Tensor) -> torch.Tensor | None:
        if not self.training or self.config.hidden_dropout == 0.0:
            return None
        first, count = self.tp.sequence_span(places.shape[0])
        return token_keys(self.seed, layer, site, self.sample_ids, places[first:first + count])

    def _attention_keys(self, layer: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.training or self.config.attention_dropout == 0.0:
            return None
        keys = token_keys(self.seed, layer, _ATTENTION, self.sample_ids, places)  # [k, b]
        return keys.t()[:, None, :, None], places.t().to(torch.int32)[:, None, None, :]
