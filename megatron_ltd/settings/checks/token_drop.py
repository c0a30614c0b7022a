"""Whether the settings of the policies fit each other and the rest of the run; each policy checks its own."""

from collections.abc import Iterator

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import policies, policy_shape
from megatron_ltd.token_drop.registry import Policies, policy_problems


def token_drop_violations(config: RunConfig) -> Iterator[str]:
    """Everything about the policies, for settings that pass `value_violations`."""
    yield from policy_problems(config.token_drop, policy_shape(config))
    try:
        active = policies(config)
    except ConfigError:
        return  # reported above
    drop = config.token_drop
    yield from _mixture_of_depths(config, active)
    for what, deciding in (
            ("a layer's tokens are chosen", [policy for policy in active.active if policy.chooses_tokens]),
            ("layers are skipped", [policy for policy in active.active if policy.skips_layers])):
        if len(deciding) > 1:
            yield (f"{' is given with '.join(policy.asked_for(drop) for policy in deciding)}: {what} by one policy; "
                   "keep one of them")
    for policy in active.active:
        if policy.is_drawn:
            yield from _counted_in_layer_tokens(config, policy.asked_for(drop))
        if policy.name == "sequence-curriculum" and config.data.train_jsonl is not None:
            yield (f"--seq-length-curriculum-start-length = {config.token_drop.seq_length_curriculum_start_length} is "
                   "given with --train-jsonl: packed prompts would lose their responses; leave it out")


def _mixture_of_depths(config: RunConfig, active: Policies) -> Iterator[str]:
    model, slices = config.model, active.shape.slices
    if model.mixture_of_depths_capacity is None:
        return
    if model.mixture_of_depths_every > model.num_layers:
        yield (f"--mixture-of-depths-every = {model.mixture_of_depths_every}: none of --num-layers = "
               f"{model.num_layers} layers would have a router; choose at most {model.num_layers}")
    strata = model.mixture_of_depths_strata
    if strata % slices:
        yield (f"--mixture-of-depths-strata = {strata}: with --sequence-parallel it must be a multiple of "
               f"--tensor-model-parallel-size = {slices}; use --mixture-of-depths-strata "
               f"{(strata // slices + 1) * slices}")
    uneven = next((plan.read_tokens for plan in active.stretches if plan.read_tokens % strata), None)
    if uneven is not None:
        yield (f"--mixture-of-depths-strata = {strata}: does not divide the {uneven} tokens that a step reads of a "
               "sample; choose a divisor of --seq-length, and of the lengths of a curriculum or of bags")


def _counted_in_layer_tokens(config: RunConfig, asked_for: str) -> Iterator[str]:
    counted = {"--token-budget = layer": config.training.token_budget == "layer" and
               config.training.train_tokens is not None,
               "--layer-token-lr": config.optimizer.layer_token_lr}
    yield from (f"{flag} is given with {asked_for}: how many layer tokens a step processes is drawn at that step, so "
                "lengths cannot be given in them; use steps, samples or raw tokens"
                for flag, given in counted.items() if given)
