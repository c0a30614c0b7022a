"""Settings that fit GPT but not BERT, or the reverse."""

from collections.abc import Iterator

from megatron_ltd.config import RunConfig


def family_violations(config: RunConfig) -> Iterator[str]:
    """Everything about the family, for settings that pass `value_violations`."""
    if config.model.family == "gpt" and config.model.bert_no_binary_head:
        yield "--bert-no-binary-head is given, but this is a GPT run; leave it out, or use megatron_ltd.pretrain_bert"
    if config.model.family == "bert":
        data = config.data
        for flag, given in (("--reset-position-ids", data.reset_position_ids), ("--eod-mask-loss", data.eod_mask_loss),
                            ("--reset-attention-mask", data.reset_attention_mask)):
            if given:
                yield (f"{flag} is given, but BERT's samples are not cut out of a stream of documents; leave it out")
