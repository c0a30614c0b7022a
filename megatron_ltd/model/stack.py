"""The layers of a stage around the residual stream, run according to the step's plan.

    whole layer      stream = stream + block(stream)
    some tokens      stream[rows] += block(stream[rows])            rows: the kept tokens of this layer and microbatch
    several layers   x = stream[rows]; x += block(x), ...; stream[rows] = x         consecutive layers with one set
    attends to all   stream[rows] += block(stream[rows], stream)    keys and values of all tokens
    skipped layer    stream = stream
    routed layer     stream[rows] += score[rows] block(stream[rows])            a router chooses the rows

Dropped tokens pass the layer unchanged and remain available to the next one; the kept tokens do not see them in that
layer, unless it attends to all. The stream has full length at both ends of the stack, so stages exchange tensors of one
shape whatever the plan.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import groupby

import torch
from torch import nn

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.model.attention.context import ContextMaker
from megatron_ltd.model.attention.layer import TokenContext
from megatron_ltd.model.block import Block
from megatron_ltd.model.recompute import recomputed
from megatron_ltd.model.router import Router
from megatron_ltd.parallel.collectives import TensorParallel
from megatron_ltd.token_drop import stream as residual
from megatron_ltd.token_drop.plan import LayerPlan, StepPlan, TokenSet
from megatron_ltd.token_drop.registry import Policies
from megatron_ltd.token_drop.sampling import stream_rows


class Stack(nn.Module):
    """Consecutive layers of the model.

    Args:
        layers: global ids of the layers this stack holds.
        policies: draw the kept tokens of a plan.
        recompute: "none", "selective" (norms and activation functions) or "full" (each layer).
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, layers: range, policies: Policies, recompute: str):
        super().__init__()
        self.tp = tp
        self.policies = policies
        self.whole = StepPlan.whole(config.seq_length, config.num_layers)
        self.recompute_layers = recompute == "full"
        self.blocks = nn.ModuleDict(
            {str(layer): Block(config, tp, recompute=recompute == "selective") for layer in layers})
        # Beside the blocks, so that these are compiled and recomputed as without routers.
        self.routers = nn.ModuleDict({str(layer): Router(config, tp) for layer in layers if config.is_routed(layer)})

    def forward(self, stream: torch.Tensor, contexts: ContextMaker, plan: StepPlan | None = None,
                given: Mapping[TokenSet, torch.Tensor] | None = None,
                router_weight: float | torch.Tensor = 0.0) -> torch.Tensor:
        """Evaluation computes every layer on every token, whatever the plan; routers choose by prediction.

        Args:
            plan: what the step computes; None: every token in every layer.
            given: kept positions that come with the samples, [b, k] for each set.
            router_weight: of a token in the loss of the routers' predictors.

        Shapes:
            stream [s/t or s, b, h] -> the same
        """
        plan = plan if self.training and plan is not None else self.whole
        contexts = replace(contexts, dtype=stream.dtype)
        sets = self.policies.token_sets(plan, [int(name) for name in self.blocks if name not in self.routers],
                                        contexts.batch.sample_ids, given or {})
        owned, entered = False, stream
        for token_set, layers in self._runs(plan):
            router = self.router(layers[0])
            if token_set is None or router is not None:
                stream, owned = residual.release(stream) if owned else stream, False
            if router is not None and self.training:
                of_layer = plan.layers[layers[0]]
                with _gradients(of_layer):
                    scores, kept = router(stream, of_layer.tokens, router_weight)
                stream, owned = self._on_some_tokens(stream, False, layers, plan, kept, contexts, scores), True
            elif router is not None:
                scores, chosen = router.predict(stream)
                tokens = contexts.in_layer(contexts.whole, layers[0]).seeing_only(chosen)
                stream = stream + scores[..., None] * self._update(layers[0], plan.layers[layers[0]], stream, tokens)
            elif token_set is None:
                for layer in layers:
                    tokens = contexts.in_layer(contexts.whole, layer)
                    stream = stream + self._update(layer, plan.layers[layer], stream, tokens)
            else:
                stream, owned = self._on_some_tokens(stream, owned, layers, plan, sets[token_set], contexts), True
        if stream is entered:
            # Every layer was skipped; the pipeline engine needs an output that it can detach from the input.
            return stream.clone()
        return residual.release(stream) if owned else stream

    def router(self, layer: int) -> Router | None:
        """The layer's router, under Mixture-of-Depths."""
        found = self.routers[str(layer)] if str(layer) in self.routers else None
        assert found is None or isinstance(found, Router)
        return found

    def _runs(self, plan: StepPlan) -> Iterator[tuple[TokenSet | None, list[int]]]:
        """Runs of consecutive layers that process the same tokens, without skipped layers; a routed layer is a run."""
        layers = (int(name) for name in self.blocks if not plan.layers[int(name)].skipped)
        runs = groupby(layers, lambda n: (plan.layers[n].token_set, n if str(n) in self.routers else None))
        return ((token_set, list(run)) for (token_set, _), run in runs)

    def _on_some_tokens(self, stream: torch.Tensor, owned: bool, layers: list[int], plan: StepPlan, kept: torch.Tensor,
                        contexts: ContextMaker, scores: torch.Tensor | None = None) -> torch.Tensor:
        """Apply a run of layers to the tokens at `kept` [b, k]; the returned stream may be overwritten.

        Args:
            scores: a router's, by which the layer's update is multiplied, [s/t or s, b].
        """
        rows, tokens = self._rows(kept, contexts), contexts.of(kept)
        samples = kept.shape[0]
        first = layers[0]
        if plan.layers[first].attends_to_all:
            # The layer saves the whole stream for its backward pass, so the run continues on a copy.
            everything = residual.release(stream) if owned else stream
            x = everything.flatten(0, 1).index_select(0, rows).unflatten(0, (-1, samples))  # [k/t or k, b, h]
            of_first = contexts.in_layer(contexts.of(kept, attends_to_all=True), first, kept, attends_to_all=True)
            x = x + self._update(first, plan.layers[first], x, of_first, everything)
            stream, layers = residual.own(everything), layers[1:]
        else:
            stream, taken = residual.take(stream if owned else residual.own(stream), rows)
            x = taken.unflatten(0, (-1, samples))
            if len(layers) == 1:
                update = self._update(first, plan.layers[first], x, contexts.in_layer(tokens, first, kept))
                update = update.flatten(0, 1)
                return residual.add(stream, rows, update if scores is None else scores.flatten()[rows, None] * update)
        for layer in layers:
            x = x + self._update(layer, plan.layers[layer], x, contexts.in_layer(tokens, layer, kept))
        return residual.put(stream, rows, x.flatten(0, 1))

    def _rows(self, kept: torch.Tensor, contexts: ContextMaker) -> torch.Tensor:
        """Rows of the kept tokens that this process holds. The selection is stratified over the slices of the sequence,
        so every process holds an equal share of them and selects them before the tensor-parallel region gathers.

        Shapes:
            kept [b, k] -> [k/t b or k b]
        """
        first_position, _ = self.tp.sequence_span(contexts.batch.read_tokens)
        first, count = self.tp.sequence_span(kept.shape[1])
        return stream_rows(kept[:, first:first + count] - first_position)

    def _update(self, layer: int, plan: LayerPlan, x: torch.Tensor, tokens: TokenContext,
                everything: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's update, of the shape of x."""
        block = self.blocks[str(layer)]
        with _gradients(plan):
            update = recomputed(self.recompute_layers and self.training and plan.backward, block, x, tokens, everything)
        # Outside the block, which would be recompiled for every value.
        return update if plan.scale == 1.0 else update * plan.scale


def _gradients(plan: LayerPlan) -> AbstractContextManager:
    """Within it a layer without a backward pass computes constants."""
    return nullcontext() if plan.backward else torch.no_grad()
