"""The data that accompany a microbatch's tokens: positions, documents, padding, and the keys of their dropout masks.

A layer that keeps some tokens gets the context of just these, gathered with the same indices: rotary angles are those
of the true positions, as are ALiBi's distances, and attention never crosses a document boundary hidden by dropped
tokens. Angles and masks are computed once per set of tokens, however many layers process it.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.arithmetic.alibi import slopes
from megatron_ltd.model.attention.convolution import Reading, reading_of
from megatron_ltd.model.attention.documents import Documents, find_documents, has_kernel
from megatron_ltd.model.attention.layer import TokenContext
from megatron_ltd.model.attention.rotary import rotary_angles
from megatron_ltd.model.dropout import token_keys
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.token_drop.transfer import sent

_ATTENTION, _AFTER_ATTENTION, _AFTER_MLP = range(3)
EMBEDDING_LAYER = 1 << 20
"""Layer number for the embedding's dropout, outside the range of real layers."""


def biased(mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, config: ModelConfig,
           tp: TensorParallel) -> torch.Tensor:
    """A mask as what is added to the scores: ALiBi's bias, and minus infinity where attention is not allowed.

    Args:
        queries, keys: positions in the sample.

    Shapes:
        mask [b or 1, 1, k, c] bool, queries [b or 1, k], keys [b or 1, c] -> [b or 1, n/t, k, c] fp32
    """
    first, count = tp.shard_span(config.num_attention_heads)
    slope = sent(torch.tensor(slopes(config.num_attention_heads)[first:first + count]), mask.device)[:, None, None]
    distance = (queries[:, None, :, None] - keys[:, None, None, :]).float()
    return (distance * -slope).masked_fill(~mask, float("-inf"))


@dataclass(frozen=True)
class Microbatch:
    """A stage's inputs for a microbatch, besides the tokens and their labels.

    Args:
        read_tokens: tokens of each sample, s.
        sample_ids: global sample indices.
        position_ids: positions that count from the start of each document; None counts from the start of the sample.
        document_ids: which document each token belongs to; None allows attention over the whole sample.
        most_documents: a bound on their number in all samples; None where the host does not know one.
        padding_mask: which tokens are real; None: all.

    Shapes:
        sample_ids [b], position_ids, document_ids and padding_mask [b, s]
    """

    read_tokens: int
    sample_ids: torch.Tensor
    position_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    most_documents: int | None = None
    padding_mask: torch.Tensor | None = None

    @cached_property
    def everywhere(self) -> torch.Tensor:
        """Shapes: [s, 1]"""
        return torch.arange(self.read_tokens, device=self.sample_ids.device)[:, None]

    def positions(self) -> torch.Tensor:
        """Shapes: [s, b], or [s, 1] where all samples agree"""
        return self.everywhere if self.position_ids is None else self.position_ids.t()


@dataclass(frozen=True)
class ContextMaker:
    """Makes the contexts of a microbatch's tokens.

    Args:
        config: the model's settings.
        tp: the axis over which the sequence may be sliced.
        seed: of dropout.
        training: whether dropout is active.
        dtype: of activations; None: masks stay bool.
    """

    config: ModelConfig
    tp: TensorParallel
    seed: int
    training: bool
    batch: Microbatch
    dtype: torch.dtype | None = None

    def embedding_keys(self) -> torch.Tensor | None:
        """Dropout keys of the embedding. Shapes: [s/t or s, b]"""
        return self._hidden_keys(EMBEDDING_LAYER, _AFTER_MLP, self.batch.everywhere)

    @cached_property
    def whole(self) -> TokenContext:
        """The context of all tokens, without dropout."""
        return self.of(None)

    def of(self, kept: torch.Tensor | None, *, attends_to_all: bool = False) -> TokenContext:
        """The context of some tokens, without dropout.

        Args:
            kept: positions of the tokens, ascending; None: all.
            attends_to_all: keys and values are those of all tokens.

        Shapes:
            kept [b, k]
        """
        gpt = self.config.family == "gpt"
        documents = None if attends_to_all else self._documents(kept)
        if documents is not None:
            return TokenContext(angles=self._angles(kept), documents=documents, reading=self._reading(kept))
        mask = self._causal_mask(kept, attends_to_all) if gpt else self._padding_mask(kept, attends_to_all)
        window = self._window_mask(kept, attends_to_all) if self.config.window_size is not None else None
        window = window if window is None or mask is None else window & mask
        if self.config.position_embedding_type == "alibi":
            mask, window = (None if allowed is None else self._biased(allowed, kept, attends_to_all)
                            for allowed in (mask, window))
        return TokenContext(causal=gpt, angles=self._angles(kept), mask=self._as_summand(mask),
                            window_mask=self._as_summand(window),
                            key_angles=self._angles(None) if attends_to_all else None, reading=self._reading(kept),
                            key_reading=self._reading(None) if attends_to_all else None)

    def in_layer(self, context: TokenContext, layer: int, kept: torch.Tensor | None = None, *,
                 attends_to_all: bool = False) -> TokenContext:
        """The same context with a layer's dropout keys, its window and its angles.

        Args:
            kept, attends_to_all: those with which the context was made.
        """
        context = context.for_layer(self.config, layer)
        if not self.training or self.config.hidden_dropout == self.config.attention_dropout == 0.0:
            return context
        places = self.batch.everywhere if kept is None else kept.t()  # [k, b or 1]
        first, second = (self._hidden_keys(layer, site, places) for site in (_AFTER_ATTENTION, _AFTER_MLP))
        key_places = self.batch.everywhere if attends_to_all else places
        return replace(context, hidden_keys=None if first is None or second is None else (first, second),
                       attention_keys=self._attention_keys(layer, places, key_places))

    @cached_property
    def _all_angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary angles of the whole sequence. Shapes: two of [s, b or 1, 1, r / 2]"""
        return rotary_angles(self.batch.positions(), self.config, self.batch.read_tokens)

    def _angles(self, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.config.position_embedding_type != "rope":
            return None
        if kept is None:
            return self._all_angles
        samples = torch.arange(kept.shape[0], device=kept.device)
        cos, sin = (table.expand(-1, kept.shape[0], -1, -1)[kept.t(), samples] for table in self._all_angles)
        return cos, sin  # [k, b, 1, r / 2]

    def _reading(self, kept: torch.Tensor | None) -> Reading | None:
        """What a convolution reads; None where that is every token before, or nothing."""
        config, documents = self.config, self.batch.document_ids
        # Routers leave out some of the tokens before, which `seeing_only` cannot do in what is not listed.
        lists = kept is not None or documents is not None or config.mixture_of_depths_capacity is not None
        if config.qkv_conv_kernel is None or not lists:
            return None
        places = self.batch.everywhere if kept is None else kept.t()
        if documents is not None:
            documents = (documents if kept is None else documents.gather(1, kept)).t()
        return reading_of(places, config.qkv_conv_kernel - 1, documents, gaps=kept is not None)

    def _documents(self, kept: torch.Tensor | None) -> Documents | None:
        """The tokens' documents, where a kernel that knows documents computes the attention of all layers. The padding
        at the end of a sample is one more."""
        config, batch = self.config, self.batch
        ids, bound = batch.document_ids, batch.most_documents
        if ids is None and batch.padding_mask is not None:
            ids, bound = batch.padding_mask, 2 * len(batch.padding_mask)
        masked = (config.window_size is not None or config.position_embedding_type == "alibi"
                  or config.mixture_of_depths_capacity is not None
                  or (self.training and config.attention_dropout > 0.0))
        if ids is None or bound is None or masked or not has_kernel(ids.device, self.dtype, config.head_dim):
            return None
        return find_documents(ids if kept is None else ids.gather(1, kept), bound, causal=config.family == "gpt")

    def _causal_mask(self, kept: torch.Tensor | None, attends_to_all: bool) -> torch.Tensor | None:
        """Mask of earlier tokens in the same document; None if plain causal attention is equivalent.

        Shapes:
            -> [b or 1, 1, k, c]
        """
        is_biased = self.config.position_embedding_type == "alibi"
        if self.batch.document_ids is None and not attends_to_all and not is_biased:
            return None
        queries, keys = self._places(kept, attends_to_all)
        mask = queries[:, :, None] >= keys[:, None, :]
        if self.batch.document_ids is not None:
            documents = self.batch.document_ids if kept is None else self.batch.document_ids.gather(1, kept)
            of_keys = self.batch.document_ids if attends_to_all else documents
            mask = mask & (documents[:, :, None] == of_keys[:, None, :])
        return mask[:, None]

    def _biased(self, mask: torch.Tensor, kept: torch.Tensor | None, attends_to_all: bool) -> torch.Tensor:
        """The mask with ALiBi's biases. Shapes: [b or 1, 1, k, c] bool -> [b or 1, n/t, k, c] fp32"""
        return biased(mask, *self._places(kept, attends_to_all), self.config, self.tp)

    def _places(self, kept: torch.Tensor | None, attends_to_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in the sample of queries and keys. Shapes: [b or 1, k], [b or 1, c]"""
        everywhere = self.batch.everywhere.t()
        queries = everywhere if kept is None else kept
        return queries, everywhere if attends_to_all else queries

    def _window_mask(self, kept: torch.Tensor | None, attends_to_all: bool) -> torch.Tensor | None:
        """Mask of tokens within the sliding window, by their true positions; None if it reaches everything.

        Shapes:
            -> [b or 1, 1, k, c]
        """
        assert self.config.window_size is not None
        before = self.config.window_size[0]
        if before >= self.batch.read_tokens - 1:
            return None
        queries, keys = self._places(kept, attends_to_all)
        distance = queries[:, :, None] - keys[:, None, :]
        return ((distance >= 0) & (distance <= before))[:, None]

    def _padding_mask(self, kept: torch.Tensor | None, attends_to_all: bool) -> torch.Tensor | None:
        """Mask of real tokens. If a short sample keeps only padding, padding attends to padding: a softmax over nothing
        is NaN, and the results for padding are never used.

        Shapes:
            -> [b, 1, 1, c]
        """
        if self.batch.padding_mask is None:
            return None
        real = self.batch.padding_mask if kept is None or attends_to_all else self.batch.padding_mask.gather(1, kept)
        return (real | ~real.any(dim=1, keepdim=True))[:, None, None]

    def _as_summand(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask as fused kernels add it to the scores: 0 or minus infinity. They would convert a bool mask in each
        layer, and keep each result for the backward pass."""
        dropout = self.training and self.config.attention_dropout > 0.0
        if mask is None or self.dtype is None or dropout:
            return mask
        if mask.is_floating_point():
            return mask.to(self.dtype)
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, float("-inf"))

    def _hidden_keys(self, layer: int, site: int, places: torch.Tensor) -> torch.Tensor | None:
        if not self.training or self.config.hidden_dropout == 0.0:
            return None
        first, count = self.tp.sequence_span(places.shape[0])
        return token_keys(self.seed, layer, site, self.batch.sample_ids, places[first:first + count])

    def _attention_keys(self, layer: int, places: torch.Tensor, key_places: torch.Tensor,
                        ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.training or self.config.attention_dropout == 0.0:
            return None
        keys = token_keys(self.seed, layer, _ATTENTION, self.batch.sample_ids, places)  # [k, b]
        return keys.t()[:, None, :, None], key_places.t().to(torch.int32)[:, None, None, :]
