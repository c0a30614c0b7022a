"""What a whole run costs on a cluster: time, accelerator hours, and the share of the peak that it uses."""

from collections import Counter
from dataclasses import dataclass, replace

from megatron_ltd.config.run import RunConfig
from megatron_ltd.plan.derived import layer_tokens, policies, total_steps
from megatron_ltd.plan.flops import step_flops
from megatron_ltd.plan.layouts.cluster import Cluster
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.roofline import Roofline
from megatron_ltd.token_drop.plan import StepPlan

REPRESENTATIVES = 5


@dataclass(frozen=True)
class RunCost:
    """Args:
        tokens: read.
        flops: of the model's mathematics.
    """

    steps: int
    seconds: float
    tokens: int
    flops: float
    cluster: Cluster

    @property
    def days(self) -> float:
        return self.seconds / 86400

    @property
    def gpu_hours(self) -> float:
        return self.cluster.gpus * self.seconds / 3600

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """FLOPs of the model over what the accelerators could do in the time."""
        return self.flops / self.seconds / self.cluster.gpus / self.cluster.peak_tflops / 1e12


def run_cost(config: RunConfig, layout: Layout, cluster: Cluster, *, whole: bool = False) -> RunCost:
    """The cost of the run that the settings describe.

    Args:
        whole: of the same steps with every token in every layer.
    """
    found = policies(config)
    roofline = Roofline(config, layout, cluster, found)
    seconds = flops = 0.0
    tokens = 0
    for steps, stretch in layer_tokens(config, layout.dp).within(total_steps(config, layout.dp)):
        plan = StepPlan.whole(stretch.plan.read_tokens, len(stretch.plan.layers), stretch.plan.fold) if whole \
            else stretch.plan
        batch = replace(layout, microbatches=max(1, stretch.batch_samples // (layout.micro_samples * layout.dp)))
        timed = Roofline(config, batch, cluster, found, roofline.layers, roofline.activations)
        seconds += steps * timed.step(plan).seconds
        flops += steps * stretch.batch_samples * step_flops(config, plan)
        tokens += steps * stretch.batch_samples * plan.text_tokens
    return RunCost(total_steps(config, layout.dp), seconds, tokens, flops, cluster)


def step_shares(config: RunConfig, dp: int) -> dict[StepPlan, float]:
    """A few plans that stand for the run's steps, with their shares: the first, the last, and some between."""
    counts: Counter[StepPlan] = Counter()
    for steps, stretch in layer_tokens(config, dp).within(total_steps(config, dp)):
        counts[stretch.plan] += steps * stretch.batch_samples
    plans = list(counts)
    chosen = sorted({round(place * (len(plans) - 1) / max(1, REPRESENTATIVES - 1)) for place in range(REPRESENTATIVES)})
    shares = dict.fromkeys((plans[place] for place in chosen), 0.0)
    for number, plan in enumerate(plans):
        shares[plans[min(chosen, key=lambda place, number=number: abs(place - number))]] += counts[plan]  # type: ignore[misc]
    return shares
