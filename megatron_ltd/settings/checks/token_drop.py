"""Whether the settings of the policies fit each other and the rest of the run; each policy checks its own."""

from collections.abc import Iterator

from megatron_ltd.config import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import policies, policy_shape
from megatron_ltd.token_drop.registry import policy_problems


def token_drop_violations(config: RunConfig) -> Iterator[str]:
    """Everything about the policies, for settings that pass `value_violations`."""
    yield from policy_problems(config.token_drop, policy_shape(config))
    try:
        active = policies(config)
    except ConfigError:
        return  # reported above
    drop = config.token_drop
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


def _counted_in_layer_tokens(config: RunConfig, asked_for: str) -> Iterator[str]:
    counted = {"--token-budget = layer": config.training.token_budget == "layer" and
               config.training.train_tokens is not None,
               "--layer-token-lr": config.optimizer.layer_token_lr}
    yield from (f"{flag} is given with {asked_for}: how many layer tokens a step processes is drawn at that step, so "
                "lengths cannot be given in them; use steps, samples or raw tokens"
                for flag, given in counted.items() if given)
