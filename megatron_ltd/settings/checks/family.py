"""What a model family, and the importance policy in it, can do: settings that fit GPT but not BERT, or the reverse."""

from collections.abc import Iterator

from megatron_ltd.config import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import dropped_layers, predictions_per_sample, start_length

SPECIAL_TOKENS = 3
"""[CLS] and two [SEP] of a BERT sample."""


def family_violations(config: RunConfig) -> Iterator[str]:
    """Everything about family and importance, for settings that pass `value_violations`."""
    drop = config.token_drop
    if drop.random_ltd and drop.token_drop_policy == "importance":
        yield ("--random-ltd is given with --token-drop-policy = importance: a run has one policy; keep one of them")
    elif drop.policy == "importance":
        yield from _importance(config)
    if config.model.family == "gpt" and config.model.bert_no_binary_head:
        yield "--bert-no-binary-head is given, but this is a GPT run; leave it out, or use megatron_ltd.pretrain_bert"
    if config.model.family == "bert":
        data = config.data
        for flag, given in (("--reset-position-ids", data.reset_position_ids), ("--eod-mask-loss", data.eod_mask_loss),
                            ("--reset-attention-mask", data.reset_attention_mask)):
            if given:
                yield (f"{flag} is given, but BERT's samples are not cut out of a stream of documents; leave it out")


def _importance(config: RunConfig) -> Iterator[str]:
    drop = config.token_drop
    try:
        dropped = dropped_layers(config)
        least = start_length(config)  # lengths never fall
    except ConfigError:
        return  # said where the layers and lengths themselves are checked
    if 0 in dropped:
        yield (f"--random-ltd-layers = {drop.random_ltd_layers}: the importance policy leaves the first layer whole, "
               "since dropped tokens must have met their neighbours once; begin with layer 1")
    predictions = predictions_per_sample(config)
    if predictions is not None and least < predictions + SPECIAL_TOKENS:
        yield (f"{least} kept tokens: fewer than the up to {predictions} masked tokens (--mask-prob = "
               f"{config.data.mask_prob} of --seq-length = {config.model.seq_length}) and {SPECIAL_TOKENS} special "
               f"ones that are always kept; keep at least {predictions + SPECIAL_TOKENS}")
    keep, discard = drop.token_drop_always_keep_ids or (), drop.token_drop_always_drop_ids or ()
    if both := sorted(set(keep) & set(discard)):
        yield (f"--token-drop-always-keep-ids and --token-drop-always-drop-ids both name {both[0]}; it can be one of "
               "the two")
