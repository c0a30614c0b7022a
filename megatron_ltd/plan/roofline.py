"""How long a step takes on a cluster, by a roofline of its operations.

Of a microbatch on one process, in seconds:

    products    FLOPs / (peak x efficiency), or reading the weights if that takes longer; backward twice forward
    attention   FLOPs / (peak x efficiency of attention); backward 2.5 x forward, since scores are computed again
    memory      bytes of norms, activations, residual sums and logits / (rate x efficiency); backward twice forward
    gradients   of the weights: bytes to add them to those of earlier microbatches, or to copy them where they are
                reduced; under ZeRO-3 also to copy the weights from where they are gathered, forward and backward
    tensor      2 (t - 1) / t bytes of the stream, twice forward and twice backward, / rate of the link
    pipeline    the stream received forward and its gradient received backward

    step        the pipeline's time by the works of its processes (`pipeline_costs`), + what of data-parallel
                communication exceeds the computation that can hide it, + update

A ring moves (d - 1) / d of the bytes to gather or to reduce-scatter, twice that to all-reduce
(https://arxiv.org/abs/2104.04473, section 3).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_ltd.config import RunConfig
from megatron_ltd.model.arithmetic.flops import attention_flops, cut_to, head_flops, product_flops
from megatron_ltd.plan.activations import DTYPE_BYTES, Activations
from megatron_ltd.plan.cluster import Cluster
from megatron_ltd.plan.derived import predictions_per_sample
from megatron_ltd.plan.layout import Layout
from megatron_ltd.plan.pipeline_costs import pipeline_time
from megatron_ltd.plan.shards import Shards
from megatron_ltd.token_drop.plan import LayerPlan, StepPlan
from megatron_ltd.token_drop.registry import Policies

UPDATE_BYTES = {"adam": 40, "sgd": 32, "muon": 40}
"""Memory traffic of clipping and updating a parameter: weight, gradient and moments, read and written."""


@dataclass(frozen=True)
class Parts:
    """Seconds by kind."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    pipeline: float = 0.0

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(self.products + other.products, self.attention + other.attention, self.memory + other.memory,
                     self.tensor + other.tensor, self.pipeline + other.pipeline)

    def __mul__(self, factor: float) -> "Parts":
        return Parts(self.products * factor, self.attention * factor, self.memory * factor, self.tensor * factor,
                     self.pipeline * factor)

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.tensor + self.pipeline


@dataclass(frozen=True)
class StepTime:
    """Args:
        seconds: of the step.
        busiest: work of the process with the most, over all microbatches.
        bubble: share of the pipeline's time in which processes wait for each other.
        data: of data-parallel communication that is not hidden.
        update: of the optimizer.
    """

    seconds: float
    busiest: float
    bubble: float
    data: float
    update: float

    @property
    def waiting(self) -> float:
        """Of the busiest process for others of its pipeline."""
        return self.seconds - self.busiest - self.data - self.update


class Roofline:
    """The time of a run's steps in one layout on a cluster.

    Args:
        layers: sums over layers that other layouts of the same run left, and this one adds to.
        activations: those of another layout that differs in pipeline and data parallelism only.
    """

    def __init__(self, config: RunConfig, layout: Layout, cluster: Cluster, policies: Policies,
                 layers: dict[Any, tuple[StepPlan, tuple[list[float], list[float]]]] | None = None,
                 activations: Activations | None = None):
        self.layers = {} if layers is None else layers
        self.config, self.layout, self.cluster, self.policies = config, layout, cluster, policies
        self.values = DTYPE_BYTES[config.training.precision]
        self.shards = Shards.of(config.model, layout.tp)
        self.activations = activations or Activations(config.model, layout, self.values)
        self.products = cluster.peak_tflops * 1e12 * cluster.product_efficiency
        self.scores = cluster.peak_tflops * 1e12 * cluster.attention_efficiency
        self.memory = cluster.memory_gb_per_second * 1e9 * cluster.memory_efficiency

    def step(self, plan: StepPlan) -> StepTime:
        """The time of a step that computes this plan."""
        layout, layers = self.layout, len(plan.layers)
        forward, backward = zip(*(self._seconds(rank, plan) for rank in range(layout.pp)), strict=True)
        works = [ahead + back for ahead, back in zip(forward, backward, strict=True)]
        busiest = max(range(layout.pp), key=works.__getitem__)
        pipeline = pipeline_time(works, layout.microbatches, layout.schedule, layout.chunks, layout.splits_backward)
        data = max(self._data_parallel(rank, layers, forward[rank], backward[rank])
                   for rank in {0, layout.pp - 1, busiest})
        update = self._update(layers)
        return StepTime(pipeline + data + update, layout.microbatches * works[busiest],
                        1.0 - layout.microbatches * sum(works) / layout.pp / pipeline, data, update)

    def parts(self, plan: StepPlan) -> Parts:
        """The work of the busiest process in a step, by kind."""
        works = [sum(self._seconds(rank, plan)) for rank in range(self.layout.pp)]
        found, rank = Parts(), max(range(self.layout.pp), key=works.__getitem__)
        for first, stop in self.layout.stages(rank):
            for number in range(first, stop):
                if not plan.layers[number].skipped:
                    ahead, back = self._layer(plan.layers[number], plan.read_tokens,
                                              self.config.model.is_windowed(number))
                    found += (ahead + back) * self.policies.share(number)
            found += self._ends(plan, first, stop)[0] + self._ends(plan, first, stop)[1]
        found += Parts(memory=self._gradients(rank, len(plan.layers)))
        return found * self.layout.microbatches

    def _seconds(self, rank: int, plan: StepPlan) -> tuple[float, float]:
        """Forward and backward work of a process on one microbatch."""
        forward, backward = 0.0, self._gradients(rank, len(plan.layers))
        ahead, back = self._sums(plan)
        for first, stop in self.layout.stages(rank):
            ends = self._ends(plan, first, stop)
            forward += ahead[stop] - ahead[first] + ends[0].total
            backward += back[stop] - back[first] + ends[1].total
        return forward, backward

    def _gradients(self, rank: int, layers: int) -> float:
        """Seconds in which a microbatch's gradients of a process's weights are added up or copied."""
        layout, reads_and_writes = self.layout, 0
        if layout.dp > 1 and layout.sharding != "no_shard":
            reads_and_writes = self.values + 4 + (4 * self.values if layout.sharding == "optim_grads_params" else 0)
        elif layout.microbatches > 1:
            reads_and_writes = self.values + 8
        return reads_and_writes * self.shards.of_stages(layout.stages(rank), layers) / self.memory

    def _sums(self, plan: StepPlan) -> tuple[list[float], list[float]]:
        """Seconds of the layers before each, forward and backward."""
        layout = self.layout
        key = layout.tp, layout.micro_samples, layout.sequence_parallel, layout.recompute, id(plan)
        if key not in self.layers:
            costs: dict[tuple[LayerPlan, bool], tuple[float, float]] = {}
            sums: tuple[list[float], list[float]] = ([0.0], [0.0])
            for number, layer in enumerate(plan.layers):
                kind = layer, self.config.model.is_windowed(number)
                if kind not in costs:
                    costs[kind] = (0.0, 0.0) if layer.skipped else tuple(
                        part.total for part in self._layer(layer, plan.read_tokens, kind[1]))  # type: ignore[assignment]
                for total, cost in zip(sums, costs[kind], strict=True):
                    total.append(total[-1] + cost * self.policies.share(number))
            self.layers[key] = plan, sums
        return self.layers[key][1]

    def _ends(self, plan: StepPlan, first: int, stop: int) -> tuple[Parts, Parts]:
        """What a stage does besides its layers, forward and backward: the head, and receiving from other stages."""
        layers = len(plan.layers)
        received = self.activations.stream(plan.read_tokens) / self._pipeline_link
        head = self._head(plan) if stop == layers else Parts()
        return (head + Parts(pipeline=received if first > 0 else 0.0),
                Parts(pipeline=received if stop < layers else 0.0))

    @cached_property
    def _moved(self) -> float:
        """Bytes that a tensor-parallel process moves for each of an all-reduce, or a gather and a reduce-scatter."""
        tp = self.layout.tp
        return (1 + self.cluster.scatter_cost if self.layout.sequence_parallel else 2) * (tp - 1) / tp

    @cached_property
    def _pipeline_link(self) -> float:
        return self.cluster.link(self.layout.pp, self.layout.tp * self.layout.dp)

    def _layer(self, layer: LayerPlan, read_tokens: int, windowed: bool) -> tuple[Parts, Parts]:
        ahead = self._layer_forward(layer, read_tokens, windowed)
        if not layer.backward:
            return ahead, Parts()
        back = Parts(2 * ahead.products, 2.5 * ahead.attention, 2 * ahead.memory, ahead.tensor)
        if self.layout.recompute == "full":
            back += ahead
        elif self.layout.recompute == "selective":
            # Norms and activation functions, about half of what is bound by memory.
            back += Parts(memory=0.5 * ahead.memory)
        return ahead, back

    def _layer_forward(self, layer: LayerPlan, read_tokens: int, windowed: bool) -> Parts:
        model, layout, samples = cut_to(self.config.model, read_tokens), self.layout, self.layout.micro_samples
        tokens, tp, h = layer.tokens * samples, layout.tp, self.config.model.hidden_size
        flops = samples * product_flops(model, layer.tokens, attends_to_all=layer.attends_to_all) / tp
        scores = samples * attention_flops(model, layer.tokens, attends_to_all=layer.attends_to_all,
                                           windowed=windowed) / tp
        between = tokens // (tp if layout.sequence_parallel else 1)
        stream = 10 + (3 if layer.token_set is not None else 0)  # two norms, two sums; taking and adding rows
        width = (3 if model.swiglu else 2) * model.ffn / tp
        if model.position_embedding_type == "rope":
            width += 2 * (model.num_attention_heads + model.query_groups) * model.head_dim / tp
        traffic = self.values * (between * h * stream + tokens * width) * self.cluster.fused
        moved = 2 * self._moved * tokens * h * self.values
        return Parts(max(flops / self.products, self.values * self.shards.layer / self.memory), scores / self.scores,
                     traffic / self.memory, moved / self.cluster.link(tp, 1))

    def _head(self, plan: StepPlan) -> Parts:
        """Forward and backward of the head, which computes its gradients in the forward pass."""
        model = cut_to(self.config.model, plan.read_tokens)
        samples, predictions = self.layout.micro_samples, predictions_per_sample(self.config)
        flops = 3 * samples * head_flops(model, predictions) / self.layout.tp
        rows = 0 if model.family == "vit" else model.padded_vocab_size // self.layout.tp
        tokens = samples * (plan.read_tokens if predictions is None else predictions)
        logits = tokens * rows * 4 * 8 * self.cluster.fused  # written, shifted, exponentiated, scaled, read twice
        moved = 2 * self._moved * tokens * model.hidden_size * self.values
        return Parts(flops / self.products, 0.0, logits / self.memory, moved / self.cluster.link(self.layout.tp, 1))

    def _data_parallel(self, rank: int, layers: int, forward: float, backward: float) -> float:
        """Seconds of a step that gathering and reducing takes beyond what computation hides."""
        layout, hides = self.layout, self.cluster.overlap
        if layout.dp == 1:
            return 0.0
        numbers = self.shards.of_stages(layout.stages(rank), layers)
        share = (layout.dp - 1) / layout.dp / self.cluster.link(layout.dp, layout.tp)
        reduce, gather = 4 * numbers * share, self.values * numbers * share
        if layout.sharding == "no_shard":
            return max(0.0, 2 * reduce - hides * backward)
        reduce *= self.cluster.scatter_cost
        if layout.sharding == "optim_grads":
            return layout.microbatches * max(0.0, reduce - hides * backward) + max(0.0, gather - hides * forward)
        return layout.microbatches * (max(0.0, gather - hides * forward)
                                      + max(0.0, gather + reduce - hides * backward))

    def _update(self, layers: int) -> float:
        mine = max(self.shards.of_stages(self.layout.stages(rank), layers) for rank in {0, self.layout.pp - 1})
        shares = 1 if self.layout.sharding == "no_shard" else self.layout.dp
        return UPDATE_BYTES[self.config.optimizer.optimizer] * mine / shares / self.memory
