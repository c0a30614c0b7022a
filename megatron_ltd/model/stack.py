"""The layers of a stage around the residual stream, with token dropping.

    full layer       stream = stream + block(stream)
    dropped layer    stream[rows] += block(stream[rows])            rows: the kept tokens of this layer and microbatch
    cross layer      stream[rows] += block(stream[rows], stream)    a dropped layer that attends to all tokens
    skipped layer    stream = stream                                by LayerDrop, for this step

Dropped tokens pass unchanged; the kept ones do not see them in that layer, unless it is a cross layer, and they are not
lost to the next. The stream has
full length at both ends of the stack, so stages exchange tensors of one shape whatever the kept length is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ltd.config import ModelConfig
from megatron_ltd.model.attention import TokenFacts
from megatron_ltd.model.block import Block
from megatron_ltd.model.facts import SampleFacts
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.token_drop import stream as residual
from megatron_ltd.token_drop.sampling import kept_positions, stream_rows
from megatron_ltd.token_drop.step_work import StepWork


@dataclass(frozen=True)
class TokenDrop:
    """Which layers drop tokens, and how.

    Args:
        layers: global ids of the dropped layers.
        seed: of the selection.
        strata: see `kept_positions`.
        shared: all dropped layers keep the set that comes with the samples, rather than each its own random one.
        cross_layer: the dropped layer, if any, that attends to all tokens.
    """

    layers: frozenset[int] = frozenset()
    seed: int = 0
    strata: int = 1
    shared: bool = False
    cross_layer: int | None = None


class Stack(nn.Module):
    """Consecutive layers of the model.

    `work` is set between steps: how many tokens of each sample a dropped layer keeps, and which layers are skipped.

    Args:
        layers: global ids of the layers this stack holds.
        recompute: "none", "selective" (the attention core) or "full" (each layer).

    Shapes:
        stream [s/t or s, b, h] -> the same
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, layers: range, drop: TokenDrop, recompute: str):
        super().__init__()
        self.tp = tp
        self.drop = drop
        self.work = StepWork.whole(config.seq_length)
        self.recompute_layers = recompute == "full"
        self.blocks = nn.ModuleDict(
            {str(layer): Block(config, tp, recompute_attention=recompute == "selective") for layer in layers})
        self.dropped = [layer for layer in layers if layer in drop.layers]

    def forward(self, stream: torch.Tensor, facts: SampleFacts) -> torch.Tensor:
        kept = self._select(facts)
        owned, given = False, stream
        for name, block in self.blocks.items():
            layer = int(name)
            if self.training and layer in self.work.skipped_layers:
                continue
            if layer in kept and layer == self.drop.cross_layer:
                stream = self._cross_layer(residual.release(stream) if owned else stream, block, kept[layer], facts,
                                           layer)
                owned = True
            elif layer in kept:
                stream, owned = stream if owned else residual.own(stream), True
                stream = self._dropped_layer(stream, block, kept[layer], facts, layer)
            else:
                stream, owned = residual.release(stream) if owned else stream, False
                stream = stream + self._run(block, stream, facts.for_layer(layer))
        if stream is given:
            # Every layer was skipped, and the pipeline engine detaches what a stage returns from what it was given.
            return stream.clone()
        return residual.release(stream) if owned else stream

    def _select(self, facts: SampleFacts) -> dict[int, torch.Tensor]:
        """Kept positions [b, k] of each dropped layer; empty when nothing is dropped."""
        if not self.training or not self.dropped or self.work.kept_tokens >= facts.sequence_tokens:
            return {}
        if self.drop.shared:
            assert facts.kept is not None, "the step gives the kept positions of a shared set"
            return dict.fromkeys(self.dropped, facts.kept)
        layers = torch.tensor(self.dropped, device=facts.sample_ids.device)
        kept = kept_positions(self.drop.seed, facts.sample_ids, layers, sequence_tokens=facts.sequence_tokens,
                              kept_tokens=self.work.kept_tokens, strata=self.drop.strata)
        return dict(zip(self.dropped, kept, strict=True))

    def _dropped_layer(self, stream: torch.Tensor, block: nn.Module, kept: torch.Tensor, facts: SampleFacts,
                       layer: int) -> torch.Tensor:
        rows = self._rows(kept, facts)
        stream, taken = residual.take(stream, rows)
        update = self._run(block, taken.unflatten(0, (-1, kept.shape[0])), facts.for_layer(layer, kept))
        return residual.add(stream, rows, update.flatten(0, 1))

    def _cross_layer(self, stream: torch.Tensor, block: nn.Module, kept: torch.Tensor, facts: SampleFacts,
                     layer: int) -> torch.Tensor:
        # The layer keeps the whole stream for its backward pass, so the kept rows are added to a copy.
        rows = self._rows(kept, facts)
        taken = stream.flatten(0, 1).index_select(0, rows).unflatten(0, (-1, kept.shape[0]))  # [k/t or k, b, h]
        update = self._run(block, taken, facts.for_layer(layer, kept, cross=True), stream)
        return residual.add(residual.own(stream), rows, update.flatten(0, 1))

    def _rows(self, kept: torch.Tensor, facts: SampleFacts) -> torch.Tensor:
        """Rows of the kept tokens that this process holds. The selection is stratified over the slices of the
        sequence, so every process holds an equal share of them, and takes them before the region gathers.

        Shapes:
            kept [b, k] -> [k/t b or k b]
        """
        first_position, _ = self.tp.sequence_span(facts.sequence_tokens)
        first, count = self.tp.sequence_span(kept.shape[1])
        return stream_rows(kept[:, first:first + count] - first_position)

    def _run(self, block: Callable[..., torch.Tensor], x: torch.Tensor, facts: TokenFacts,
             context: torch.Tensor | None = None) -> torch.Tensor:
        if self.recompute_layers and self.training:
            return checkpoint(block, x, facts, context, use_reentrant=False, preserve_rng_state=False)
        return block(x, facts, context)
