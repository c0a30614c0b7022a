"""How much memory a process needs, by arithmetic: at the moment of a step when it needs most, by kind.

Weights, gradients and moments are there throughout; the moments at which the rest may be largest are

    head        forward pass of the head: all activations, a chunk of logits, the head's gradients
    backward    beginning of a backward pass: all activations, the gradients of one layer
    reduction   after its first layer: the gradients of this layer's weights twice, without its activations
    end         end of a backward pass: the gradients of the embedding
    update      all gradients, no activations; under Muon the matrices that are gathered and sent back

Buffers of libraries and fragments of the allocator are not counted.
"""

from dataclasses import dataclass, fields
from math import prod
from operator import mul
from typing import NamedTuple

from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.shapes import parameter_count, parameter_shapes
from megatron_ltd.parallel.logit_chunks import chunk_tokens
from megatron_ltd.plan.derived import predictions_per_sample
from megatron_ltd.plan.layouts import muon
from megatron_ltd.plan.layouts.activations import DTYPE_BYTES, Activations
from megatron_ltd.plan.layouts.in_flight import held_activations
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.shards import Shards
from megatron_ltd.token_drop.plan import StepPlan

MOMENTS_BYTES = {"adam": 8, "sgd": 4, "muon": 8}
"""Of a parameter's optimizer state; that of a matrix is less under Muon, which leaves the others to AdamW."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at its peak, by kind.

    Args:
        weights: fp32 shards, and what is gathered of them in the compute dtype.
        head: logits of a chunk and the gradients of the head.
        communication: buffers of the pipeline, and those of gathering and reducing parameters.
        working: gradients of activations, and a recomputed layer.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    communication: int
    working: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


class _Moment(NamedTuple):
    """Bytes at a moment of a step, besides weights and moments, and whether there are gradients of all weights."""

    activations: int = 0
    head: int = 0
    working: int = 0
    reduced: int = 0
    gradients: bool = False

    @property
    def needs(self) -> int:
        return self.activations + self.head + self.working + self.reduced


class MemoryModel:
    """The memory of a run's processes.

    Args:
        device: `cpu` or `cuda`, on which the size of chunks and the overlap of communication depend.
        activations: those of another layout that differs in pipeline and data parallelism only.
    """

    def __init__(self, config: RunConfig, layout: Layout, device: str = "cuda",
                 activations: Activations | None = None):
        self.config, self.layout, self.device = config, layout, device
        self.model, self.values = config.model, DTYPE_BYTES[config.training.precision]
        self.shards = Shards.of(config.model, layout.tp)
        self.activations = activations or Activations(config.model, layout, self.values, fused_norm=device != "cpu")
        self.has_engine = layout.dp > 1 or self.values < 4

    def peak(self, rank: int, plan: StepPlan) -> Memory:
        """At the moment when a process of the pipeline needs most.

        Args:
            rank: of the process in its pipeline.
            plan: what the step computes.
        """
        layers, stages = len(plan.layers), self.layout.stages(rank)
        saved = [self.activations.stage(plan, first, stop) for first, stop in stages]
        heads = [self._head_saved(plan) if stop == layers else 0 for _, stop in stages]
        group = self.shards.layer * self._groups if self.has_engine else 0
        moments, accumulated = [_Moment(0, 0, self._update(stages), gradients=True)], self.layout.microbatches > 1
        late = (1 + (rank if self.layout.schedule != "zbv" else 0)) if self.layout.splits_backward else 0
        of_layers = self._backward(plan)
        working = [max(of_layers[first:stop]) for first, stop in stages]
        waiting = [late * self.activations.output_gradients(plan, first, stop) if late else 0 for first, stop in stages]
        of_last = [self.activations.layer(plan, stop - 1) for _, stop in stages]
        for chunk, counts in held_activations(self.layout.order, rank):
            (first, stop), held = stages[chunk], sum(map(mul, saved, counts))
            head = sum(map(mul, heads, counts))
            if stop == layers:
                moments += [_Moment(held, head + self._logits(plan), gradients=accumulated),
                            _Moment(held, head + self._head_backward(plan), gradients=accumulated)]
                head += self.shards.word * self.values * (self.shards.tied and first == 0) - heads[chunk]
            moments += [_Moment(held, head, waiting[chunk] + working[chunk], self.values * group or self._matrix,
                                accumulated),
                        _Moment(held - of_last[chunk], head, waiting[chunk], (self.values + 4) * group, accumulated)]
            if first == 0:
                moments.append(_Moment(held - saved[chunk], head, self._end(plan), gradients=True))
        mine = self.shards.of_stages(stages, layers)
        gradients = 4 * mine // self.layout.shares
        most = max(moments, key=lambda moment: moment.needs + moment.gradients * gradients)
        stream = self.activations.stream(plan.read_tokens)  # one is received forward, one backward
        pipeline = sum(stream * ((first > 0) + (stop < layers)) for first, stop in stages)
        return Memory(4 * mine // self.layout.shares + self._gathered(stages, layers), gradients * most.gradients,
                      self._optimizer(stages) // self.layout.shares, most.activations, most.head,
                      pipeline + most.reduced, most.working)

    def state(self, rank: int) -> int:
        """Weights, gradients and optimizer state of a process."""
        stages, layers = self.layout.stages(rank), self.model.num_layers
        kept = 8 * self.shards.of_stages(stages, layers) + self._optimizer(stages)
        return kept // self.layout.shares + self._gathered(stages, layers)

    def _optimizer(self, stages: list[tuple[int, int]]) -> int:
        """The optimizer's state before it is sharded."""
        kind, layers = self.config.optimizer.optimizer, self.model.num_layers
        less = MOMENTS_BYTES[kind] - muon.MOMENT_BYTES if kind == "muon" else 0
        return MOMENTS_BYTES[kind] * self.shards.of_stages(stages, layers) - less * self._matrices(stages)

    def _matrices(self, stages: list[tuple[int, int]]) -> int:
        """Numbers of the matrices of stages, before data-parallel sharding."""
        return self.shards.matrices * sum(stop - first for first, stop in stages)

    def _update(self, stages: list[tuple[int, int]]) -> int:
        """What the update needs: nothing that counts, or Muon's matrices, beyond the gathered weights that are freed
        before it."""
        if self.config.optimizer.optimizer != "muon":
            return 0
        layers, local = sum(stop - first for first, stop in stages), self._matrices(stages) // self.layout.shares
        needs = muon.update_bytes(self.config, self.layout, layers, local)
        return max(0, needs - self._gathered(stages, self.model.num_layers))

    @property
    def _matrix(self) -> int:
        """Without an engine, a matrix's gradient before it is added to those of earlier microbatches."""
        return 4 * self.model.ffn // self.layout.tp * self.model.hidden_size

    def _gathered(self, stages: list[tuple[int, int]], layers: int) -> int:
        """Parameters in the compute dtype between their passes: all, or under ZeRO-3 one layer's, two where gathering
        overlaps, and those outside the layers."""
        if not self.has_engine:
            return 0
        if self.layout.sharding != "optim_grads_params" or self.layout.dp == 1:
            return self.values * self.shards.of_stages(stages, layers)
        outside = sum(self.shards.outside_layers(first == 0, stop == layers) for first, stop in stages)
        return self.values * (outside + self._groups * self.shards.layer)

    @property
    def _groups(self) -> int:
        """Layers that are gathered or reduced at a time."""
        return 1 if self.device == "cpu" else 2

    def _tokens(self, plan: StepPlan) -> int:
        """Tokens of a microbatch that the head processes."""
        samples, predictions = self.layout.micro_samples, predictions_per_sample(self.config)
        if self.model.family == "vit":
            return samples
        return samples * (plan.read_tokens if predictions is None else predictions)

    def _rows(self) -> int:
        return 0 if self.model.family == "vit" else self.model.padded_vocab_size // self.layout.tp

    def _hidden(self, plan: StepPlan) -> int:
        return self._tokens(plan) * self.model.hidden_size * self.values

    def _head_saved(self, plan: StepPlan) -> int:
        """Input of the final norm, and the gradients that the head computes in its forward pass."""
        return self.activations.stream(plan.read_tokens) + self._hidden(plan) \
            + 4 * self._rows() * self.model.hidden_size

    def _logits(self, plan: StepPlan) -> int:
        """While the head runs: its input, and a chunk of logits, in half precision twice."""
        rows = self._rows()
        chunk = min(chunk_tokens(self.device, max(1, rows)), self._tokens(plan)) * rows
        narrow = 0 if self.values == 4 else self.values
        product = narrow * rows * self.model.hidden_size if self.device != "cpu" else 0
        return self._hidden(plan) + chunk * (4 + narrow) + product

    def _head_backward(self, plan: StepPlan) -> int:
        """The head's gradients times the loss's: another copy, and one in the compute dtype."""
        narrow = 0 if self.values == 4 else self.values
        return self._hidden(plan) + (4 + narrow) * self._rows() * self.model.hidden_size

    def _backward(self, plan: StepPlan) -> list[int]:
        """What the backward pass of each layer needs while it runs."""
        recomputes = self.layout.recompute == "full"
        of_kind: dict[int, int] = {}  # by identity: thousands of layers are compared in a search
        for number, layer in enumerate(plan.layers):
            if id(layer) not in of_kind:
                again = self.activations.saved(plan, number) - self.activations.stream(layer.tokens)
                of_kind[id(layer)] = (self.activations.transient(layer) + again * recomputes) * layer.learns
        return [of_kind[id(layer)] for layer in plan.layers]

    def _end(self, plan: StepPlan) -> int:
        """The gradient of a table of the embedding, and of its output. That of n-grams is the parameter's own where
        there is no engine and no earlier microbatch, and is copied only to be sharded."""
        word = self.shards.word * (self.values + (4 if self.has_engine else 0))
        copy = 4 if self.layout.sharding != "no_shard" else 0
        ngram = self.shards.ngram * (self.values + copy) * (self.has_engine or self.layout.microbatches > 1)
        return max(word, ngram) + 2 * self.activations.stream(plan.read_tokens)


def padded_parameter_count(config: RunConfig) -> int:
    """Parameters of the model with the rows that pad its vocabulary, those of a tied head counted once."""
    return sum(map(prod, parameter_shapes(config.model).values()))


def parameters_text(config: RunConfig) -> str:
    """How many the model has, and how many are held."""
    real, held = parameter_count(config.model), padded_parameter_count(config)
    return f"{real:,}" + (f" ({held:,} with rows that pad the vocabulary)" if held != real else "")
