"""How long a step takes on a cluster, by a roofline of its operations.

Of a microbatch on one process, in seconds:

    products    FLOPs / (peak x efficiency), or reading the weights if that takes longer; backward twice forward
    attention   FLOPs / (peak x efficiency of attention); backward 2.5 x forward, since scores are computed again
    memory      bytes of norms, activations, residual sums (`plan/layouts/traffic.py`) and logits / (rate x efficiency)
    gradients   of the weights: bytes to add them to those of earlier microbatches, and to copy them where they are
                reduced; bytes to copy the weights from where they are gathered, under ZeRO-3 forward and backward
    tensor      a layer's stream is summed twice forward and twice backward; under sequence parallelism it is gathered
                and scattered as often, and gathered twice more for the weights' gradients, beside products
    pipeline    the stream received forward and its gradient received backward

    step        the pipeline's time by the works of its processes (`pipeline_costs`), + what of data-parallel
                communication exceeds the computation that can hide it, + update

    update      bytes of weights, gradients and moments; under Muon also the products of the process that makes most
                matrices whole, and the exchange of what it gathers and sends back

A ring moves (d - 1) / d of the bytes to gather or to reduce-scatter, twice that to all-reduce
(https://arxiv.org/abs/2104.04473, section 3).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.flops import attention_flops, cut_to, head_flops, product_flops
from megatron_ltd.plan.derived import predictions_per_sample
from megatron_ltd.plan.layouts.activations import DTYPE_BYTES, Activations
from megatron_ltd.plan.layouts.cluster import Cluster
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.muon import exchanged_numbers, iterated_bytes, owned
from megatron_ltd.plan.layouts.pipeline_costs import pipeline_time
from megatron_ltd.plan.layouts.shards import Shards
from megatron_ltd.plan.layouts.traffic import Traffic, backward_traffic, forward_traffic, spared_traffic
from megatron_ltd.token_drop.plan import LayerPlan, StepPlan
from megatron_ltd.token_drop.registry import Policies

UPDATE_BYTES = {"adam": 40, "sgd": 32, "muon": 106}
"""Memory traffic of clipping and updating a parameter: weight, gradient and moments, read and written.
Muon's is that of a matrix's number; its products and its exchange are counted apart (`plan/layouts/muon.py`)."""


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
        left = self.seconds - self.busiest - self.data - self.update
        return left if left > 1e-12 * self.seconds else 0.0  # what rounding leaves


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
        """Seconds in which a microbatch's gradients of a process's weights are added up and copied, and its weights
        copied: what is done once a step by its share."""
        numbers = self.shards.of_stages(self.layout.stages(rank), layers)
        return self._bytes_a_number * numbers / self.memory

    @cached_property
    def _bytes_a_number(self) -> float:
        """Read and written for each number of the weights in a microbatch, as FSDP2 does: gathered weights are copied
        from the shard to a buffer, and from a buffer to where they are used; gradients to a buffer, where replicated
        ones are divided and copied once more."""
        layout, values, once = self.layout, self.values, 1.0 / self.layout.microbatches
        if layout.dp > 1 and layout.sharding != "no_shard":
            casting = 4 + values if values < 4 else 0
            gather = 2 * values + (2 * values + casting) / layout.dp
            passes = 2.0 if layout.sharding == "optim_grads_params" else once
            return gather * passes + values + 4 + 12 * (1.0 - once) / layout.dp
        engine = 2 * (4 + values) + (16 if layout.dp > 1 else 8) if layout.dp > 1 or values < 4 else 0
        return engine * once + (values + 8) * (1.0 - once)

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
        ahead = self._head(plan) if stop == layers else Parts()
        table = self._table(plan) if first == 0 else 0.0
        return (ahead + Parts(pipeline=received if first > 0 else 0.0),
                Parts(memory=table, pipeline=received if stop < layers else 0.0))

    def _table(self, plan: StepPlan) -> float:
        """Seconds in which the embedding is read, and the gradients of its tables filled."""
        tokens = plan.read_tokens * self.layout.micro_samples * self.config.model.hidden_size
        return self.values * (self.shards.word + self.shards.ngram + 8 * tokens * self.cluster.fused) / self.memory

    def _collective(self, kind: str, size: float, members: int, link: float) -> float:
        """Seconds in which processes gather, scatter (with a sum) or reduce so many bytes in all, by rings."""
        shares = {"gather": 1.0, "scatter": self.cluster.scatter_cost, "reduce": 2.0}[kind]
        return shares * (members - 1) / members * size / link

    def _exchange(self, tokens: int, kinds: tuple[str, ...] = ("gather", "scatter")) -> float:
        """Seconds in which tensor-parallel processes sum a stream of so many tokens: at once, or under sequence
        parallelism in these two halves."""
        tp, size = self.layout.tp, tokens * self.config.model.hidden_size * self.values
        halves = kinds if self.layout.sequence_parallel else ("reduce",)
        return sum(self._collective(kind, size, tp, self.cluster.link(tp, 1)) for kind in halves) if tp > 1 else 0.0

    @cached_property
    def _pipeline_link(self) -> float:
        return self.cluster.link(self.layout.pp, self.layout.tp * self.layout.dp)

    def _layer(self, layer: LayerPlan, read_tokens: int, windowed: bool) -> tuple[Parts, Parts]:
        ahead = self._layer_forward(layer, read_tokens, windowed)
        if not layer.backward:
            return ahead, Parts()
        tp, dropped = self.layout.tp, layer.token_set is not None
        traffic = backward_traffic(self.config.model, tp, dropped=dropped, compiled=self.config.training.compile)
        back = Parts(2 * ahead.products, 2.5 * ahead.attention, self._seconds_of(traffic, layer),
                     ahead.tensor + self._gathered_again(layer, ahead.products))
        if self.layout.recompute == "full":
            back += replace(ahead, products=ahead.products * self._repeated)
        elif self.layout.recompute == "selective":
            back += Parts(memory=self._seconds_of(spared_traffic(self.config.model, tp), layer))
        return ahead, back

    @cached_property
    def _repeated(self) -> float:
        """Share of a layer's products that full recomputation repeats: all but its last, the MLP's (`recompute.py`)."""
        model = self.config.model
        last = 2 * model.hidden_size * model.ffn
        return 1.0 - last / product_flops(model, 1)

    def _gathered_again(self, layer: LayerPlan, products: float) -> float:
        """Seconds of gathering what two regions read for the gradients of their weights, beyond the products of those
        of their inputs."""
        if not self.layout.sequence_parallel:
            return 0.0
        twice = 2 * self._exchange(layer.tokens * self.layout.micro_samples, ("gather",))
        return max(0.0, twice - self.cluster.overlap * products)

    def _seconds_of(self, traffic: Traffic, layer: LayerPlan) -> float:
        """Of what a layer reads and writes for its tokens."""
        tokens = layer.tokens * self.layout.micro_samples
        between = tokens // self.layout.slices
        numbers = between * traffic.between + tokens * traffic.within
        return self.values * numbers * self.cluster.fused / self.memory

    def _layer_forward(self, layer: LayerPlan, read_tokens: int, windowed: bool) -> Parts:
        model, layout, samples = cut_to(self.config.model, read_tokens), self.layout, self.layout.micro_samples
        tp = layout.tp
        flops = samples * product_flops(model, layer.tokens, attends_to_all=layer.attends_to_all) / tp
        scores = samples * attention_flops(model, layer.tokens, attends_to_all=layer.attends_to_all,
                                           windowed=windowed) / tp
        return Parts(max(flops / self.products, self.values * self.shards.layer / self.memory), scores / self.scores,
                     self._seconds_of(forward_traffic(model, tp, dropped=layer.token_set is not None,
                                                      compiled=self.config.training.compile), layer),
                     2 * self._exchange(layer.tokens * samples))

    def _head(self, plan: StepPlan) -> Parts:
        """Forward and backward of the head, which computes its gradients in the forward pass."""
        model = cut_to(self.config.model, plan.read_tokens)
        samples, predictions = self.layout.micro_samples, predictions_per_sample(self.config)
        flops = 3 * samples * head_flops(model, predictions) / self.layout.tp
        rows = 0 if model.family == "vit" else model.padded_vocab_size // self.layout.tp
        tokens = samples * (plan.read_tokens if predictions is None else predictions)
        logits = tokens * rows * 4 * 8 * self.cluster.fused  # written, shifted, exponentiated, scaled, read twice
        logits += 12 * rows * model.hidden_size  # the gradient of the table: filled, read and scaled
        return Parts(flops / self.products, 0.0, logits / self.memory, 2 * self._exchange(tokens))

    def _data_parallel(self, rank: int, layers: int, forward: float, backward: float) -> float:
        """Seconds of a step that gathering and reducing takes beyond what computation hides."""
        layout, hides = self.layout, self.cluster.overlap
        if layout.dp == 1:
            return 0.0
        numbers = self.shards.of_stages(layout.stages(rank), layers)
        link = self.cluster.link(layout.dp, layout.tp)
        if layout.sharding == "no_shard":
            return max(0.0, self._collective("reduce", 4 * numbers, layout.dp, link) - hides * backward)
        reduce = self._collective("scatter", 4 * numbers, layout.dp, link)
        gather = self._collective("gather", self.values * numbers, layout.dp, link)
        if layout.sharding == "optim_grads":
            return layout.microbatches * max(0.0, reduce - hides * backward) + max(0.0, gather - hides * forward)
        return layout.microbatches * (max(0.0, gather - hides * forward)
                                      + max(0.0, gather + reduce - hides * backward))

    def _update(self, layers: int) -> float:
        return max(self._update_of(self.layout.stages(rank), layers) for rank in {0, self.layout.pp - 1})

    def _update_of(self, stages: list[tuple[int, int]], layers: int) -> float:
        """Seconds in which a process updates its share of these stages' weights."""
        layout, kind = self.layout, self.config.optimizer.optimizer
        mine = self.shards.of_stages(stages, layers) / layout.shares
        if kind != "muon":
            return UPDATE_BYTES[kind] * mine / self.memory
        depth, members = sum(stop - first for first, stop in stages), layout.tp * layout.dp
        matrices = self.shards.matrices * depth // layout.shares
        most = owned(self.config, depth, members)
        local = UPDATE_BYTES["adam"] * (mine - matrices) + UPDATE_BYTES["muon"] * matrices
        products = self.config.optimizer.muon_num_ns_steps * most.flops / self.products
        gathered, returned = exchanged_numbers(layout, matrices, most.numbers)
        moved = (members - 1) / members * (iterated_bytes(self.config) * gathered + 4 * returned)
        return local / self.memory + products + moved / self.cluster.message_link(members)
