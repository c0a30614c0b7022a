"""What a single setting may be, whatever the others are."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_ltd.config import RunConfig


class Range(NamedTuple):
    """Allowed values of one number; the bounds themselves are allowed unless `open_`."""

    low: float
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        if self.high is None:
            return above
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.low_open else f"at least {self.low}"
        if self.high is None:
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high}"


_ONE_OR_MORE = Range(1)
_ZERO_OR_MORE = Range(0)
_ABOVE_ZERO = Range(0, low_open=True)
_BELOW_ONE = Range(0, 1, high_open=True)

RANGES: dict[str, dict[str, Range]] = {
    "model": {
        **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "seq_length", "ffn_hidden_size",
                         "kv_channels", "num_query_groups", "max_position_embeddings", "vocab_size",
                         "make_vocab_size_divisible_by", "img_h", "img_w", "patch_dim", "num_channels",
                         "num_classes"), _ONE_OR_MORE),
        "rotary_base": Range(1, low_open=True),
        "rotary_percent": Range(0, 1, low_open=True),
        **dict.fromkeys(("norm_epsilon", "init_method_std"), _ABOVE_ZERO),
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), _BELOW_ONE),
    },
    "token_drop": {
        **dict.fromkeys(("random_ltd_start_length", "random_ltd_steps", "random_ltd_length_step",
                         "random_ltd_strata", "seq_length_curriculum_start_length", "seq_length_curriculum_steps",
                         "seq_length_curriculum_length_step"), _ONE_OR_MORE),
        "layer_drop_rate": _BELOW_ONE,
        "random_ltd_root_degree": Range(1, 64),
        "token_drop_beta": _BELOW_ONE,
        "token_drop_initial_importance": Range(-1e4, 1e4, low_open=True, high_open=True),
    },
    "parallel": {
        **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size",
                         "num_layers_per_virtual_pipeline_stage"), _ONE_OR_MORE),
        "distributed_timeout_minutes": _ABOVE_ZERO,
    },
    "training": {
        **dict.fromkeys(("micro_batch_size", "global_batch_size", "train_iters", "train_samples", "train_tokens",
                         "train_epochs", "early_stopping_patience", "exit_interval", "loss_scale_window",
                         "hysteresis"), _ONE_OR_MORE),
        **dict.fromkeys(("exit_duration_in_mins", "loss_scale", "initial_loss_scale", "min_loss_scale"), _ABOVE_ZERO),
        "seed": Range(0, 2**32, high_open=True),
    },
    "optimizer": {
        "lr": _ABOVE_ZERO,
        **dict.fromkeys(("min_lr", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens", "lr_warmup_init",
                         "weight_decay", "clip_grad"), _ZERO_OR_MORE),
        **dict.fromkeys(("lr_decay_iters", "lr_decay_samples", "lr_decay_tokens", "lr_wsd_decay_iters",
                         "lr_wsd_decay_samples", "lr_wsd_decay_tokens"), _ONE_OR_MORE),
        **dict.fromkeys(("lr_warmup_fraction", "adam_beta1", "adam_beta2", "muon_momentum"), _BELOW_ONE),
        **dict.fromkeys(("adam_eps", "muon_extra_scale_factor"), _ABOVE_ZERO),
        "muon_num_ns_steps": Range(1, 99),
    },
    "data": {
        "num_workers": _ZERO_OR_MORE,
        "mask_prob": Range(0, 1, low_open=True, high_open=True),
        "mask_max_ngram": _ONE_OR_MORE,
        "short_seq_prob": Range(0, 1),
    },
    "checkpoint": {
        **dict.fromkeys(("save_interval", "save_retain_interval"), _ONE_OR_MORE),
        "ckpt_step": _ZERO_OR_MORE,
    },
    "logging": {
        **dict.fromkeys(("log_interval", "eval_interval"), _ONE_OR_MORE),
        "eval_iters": _ZERO_OR_MORE,
        "peak_tflops": _ABOVE_ZERO,
    },
}
"""Section -> field -> allowed values; None is allowed wherever it is the default."""

REQUIRED: tuple[tuple[str, str, Any, str], ...] = (
    ("model", "num_layers", 0, "the number of transformer layers"),
    ("model", "hidden_size", 0, "the width of the residual stream"),
    ("model", "num_attention_heads", 0, "the number of query heads"),
    ("model", "seq_length", 0, "the tokens of one sample"),
    ("optimizer", "lr", None, "the peak learning rate"),
)
"""Section, field, what it holds when it was not given, and what it is."""

_STAND_INS = {"num_layers": 5040, "hidden_size": 5040 * 64, "num_attention_heads": 5040, "seq_length": 5040 * 64,
              "lr": 1.0}
"""Values of required settings that most others go with: divisible by every small number."""

Field = tuple[str, str]


def value_violations(config: RunConfig) -> Iterator[tuple[Field, str]]:
    """Settings that are missing, or outside the range of what they mean: (section, field) and what is wrong."""
    missing = set()
    for section, field, unset, meaning in REQUIRED:
        if getattr(getattr(config, section), field) == unset:
            missing.add((section, field))
            yield (section, field), f"{flag_name(field)} is required: give {meaning}"
    for section, ranges in RANGES.items():
        for field, allowed in ranges.items():
            value = getattr(getattr(config, section), field)
            if value is not None and (section, field) not in missing and not allowed.holds(value):
                yield (section, field), (f"{flag_name(field)} = {value}: must be {allowed}; give such a number"
                                         f"{_or_leave_out(config, section, field)}")


def repaired(config: RunConfig, fields: Collection[Field]) -> RunConfig:
    """The settings with these fields put right, so that what is wrong with the others can be found too."""
    for section, field in fields:
        part = getattr(config, section)
        value = _STAND_INS.get(field, getattr(type(part)(), field))
        config = replace(config, **{section: replace(part, **{field: value})})
    return config


def _or_leave_out(config: RunConfig, section: str, field: str) -> str:
    default = getattr(type(getattr(config, section))(), field)
    if (section, field) in {(required[0], required[1]) for required in REQUIRED}:
        return ""
    return ", or leave the flag out" + (f" for {default}" if default is not None else "")


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")
