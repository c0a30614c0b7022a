"""The settings of attention: rotary scaling, windows, layers without rotation, norms of queries and keys."""

from collections.abc import Iterator

from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.rope_scaling import scaling_problems
from megatron_ltd.settings.checks.rules import given


def attention_violations(config: RunConfig) -> Iterator[str]:
    """What is wrong with them, for settings that pass `value_violations`."""
    model = config.model
    scalings = given(config, "use_rope_scaling rotary_seq_len_interpolation_factor rope_scaling")
    if len(scalings) > 1:
        yield f"{' and '.join(flag.name for flag in scalings)} are given: frequencies are scaled in one way; keep one"
    for flag in scalings[:1]:
        yield from (f"{flag.spoken(flag.of(config))}: {problem}; correct it, or leave the flag out"
                    for problem in scaling_problems(model))
    if model.window_size is not None:
        before, after = model.window_size
        if model.family != "gpt":
            yield f"--window-size = {before} {after}: windows are causal, so this model cannot have one; leave it out"
        elif before < 0 or after != 0:
            yield (f"--window-size = {before} {after}: must be the number of earlier tokens, at least 0, and 0 later "
                   "ones; give such numbers")
    for flag in given(config, "window_attn_skip_freq no_rope_freq"):
        numbers = flag.of(config)
        one, listed = len(numbers) == 1, len(numbers) == model.num_layers and set(numbers) <= {0, 1}
        if not listed and not (one and numbers[0] >= 1):
            yield (f"{flag.spoken(numbers)}: must be one number of at least 1, or 0 or 1 for each of the "
                   f"{model.num_layers} layers; give that")
    if model.qk_layernorm and model.qk_layernorm_all_heads and model.normalization != "RMSNorm":
        yield (f"--qk-layernorm-all-heads is given with --normalization = {model.normalization}: only RMSNorm runs "
               "over all heads; use --normalization RMSNorm, or leave it out")
