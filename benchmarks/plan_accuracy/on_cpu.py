"""The time of a step on CPU processes that communicate over gloo: the planner's arithmetic, and what it leaves out.

On models as small as those of the benchmark, Python and torch's dispatch take a third of the time, where an accelerator
works on while they go ahead. And gloo copies, adds up and wakes threads (`collectives.py`). What does not depend on the
machine's speed is stated relative to it, as measured alone:

    attention   torch's kernel for CPUs runs at a third of the rate of products
    memory      0.2 bytes for each FLOP of products; most of what functions read is in the cache
    messages    one of gloo's takes as long as 1/16 of the host's work on a layer, with its share of a call from Python
    the host    its work on a layer of GPT and one microbatch is 1, forward and backward; other kinds are in `HOST`
"""

from typing import NamedTuple

from benchmarks.plan_accuracy.cases import Case
from benchmarks.plan_accuracy.collectives import KINDS
from megatron_ltd.plan.derived import policies
from megatron_ltd.plan.layouts.cluster import Cluster
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.roofline import Roofline, StepTime
from megatron_ltd.token_drop.plan import StepPlan

ATTENTION, MEMORY, MESSAGE = 1 / 3, 0.2, 1 / 16
HOST = {"llama": 0.2, "recomputed": 0.8, "sequence": 0.5, "engine": 0.7, "optim_grads_params": 0.9, "ends": 1.0}
"""The host's work beyond that on a plain layer: with RMSNorm, rotary positions and SwiGLU; to recompute; to gather and
scatter slices of the sequence; of FSDP2, and to gather with every microbatch; and at each end of the model."""


class Rates(NamedTuple):
    """A machine: products in TFLOP/s, a link between processes in GB/s, and the host's seconds for a layer of GPT and a
    microbatch."""

    products: float
    link: float
    host: float


class OnCpu(Roofline):
    """A roofline in which nothing overlaps."""

    host: float

    @classmethod
    def of(cls, case: Case, rates: Rates) -> "OnCpu":
        config = case.config
        cluster = Cluster(case.processes, "core", 1.0, rates.products, rates.products * 1000 * MEMORY, case.processes,
                          rates.link, rates.link, product_efficiency=1.0, attention_efficiency=ATTENTION,
                          memory_efficiency=1.0, link_efficiency=1.0, overlap=1e-9)
        found = cls(config, Layout.of(config, case.processes), cluster, policies(config))
        found.host = rates.host
        return found

    def _collective(self, kind: str, size: float, members: int, link: float, calls: int = 1) -> float:
        each = KINDS[kind](members)
        return size * (each.link / link + each.memory / self.memory) + calls * each.messages * MESSAGE * self.host

    def _seconds(self, rank: int, plan: StepPlan) -> tuple[float, float]:
        forward, backward = super()._seconds(rank, plan)
        layout, model = self.layout, self.config.model
        each = 1.0 + HOST["llama"] * (model.normalization == "RMSNorm")
        each += HOST["recomputed"] * (layout.recompute != "none") + HOST["sequence"] * layout.sequence_parallel
        each += (HOST["engine"] + HOST.get(layout.sharding, 0.0)) * (layout.dp > 1)
        spans = layout.stages(rank)
        ends = sum((first == 0) + (stop == len(plan.layers)) for first, stop in spans)
        work = self.host * (each * sum(stop - first for first, stop in spans) + HOST["ends"] * ends)
        messages = 2 * MESSAGE * self.host * (2 * len(spans) - ends)  # one sent and one received, forward and backward
        return forward + work / 3 + messages, backward + 2 * work / 3 + messages


def predicted(case: Case, rates: Rates) -> StepTime:
    """The time of a step on such a machine."""
    return OnCpu.of(case, rates).step(policies(case.config).plan(0))
