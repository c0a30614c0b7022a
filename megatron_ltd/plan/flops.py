"""FLOPs of a step's plan."""

from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.flops import plan_flops
from megatron_ltd.plan.derived import predictions_per_sample
from megatron_ltd.token_drop.plan import StepPlan


def step_flops(config: RunConfig, plan: StepPlan) -> int:
    """Forward and backward FLOPs of one sample."""
    return plan_flops(config.model, plan, predictions_per_sample(config))


def whole_step_flops(config: RunConfig, plan: StepPlan) -> int:
    """The same if every layer processes all tokens of the text that is read: as one sample, or as several if it is
    longer than a sample."""
    samples = plan.fold if plan.text_tokens > config.model.seq_length else 1
    return samples * step_flops(config, StepPlan.whole(plan.text_tokens // samples, len(plan.layers)))
