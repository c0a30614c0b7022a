"""What a single setting may be, whatever the others are."""

from collections.abc import Iterable, Iterator

from megatron_ltd.config.run import RunConfig
from megatron_ltd.settings.flag_reference import REQUIRED, Flag, all_flags, with_settings
from megatron_ltd.token_drop.policy import BELOW_ONE, ONE_OR_MORE, Range
from megatron_ltd.token_drop.registry import POLICIES

_FIELDS: tuple[tuple[Range, str], ...] = (
    (ONE_OR_MORE, """
        num_layers hidden_size num_attention_heads seq_length ffn_hidden_size kv_channels num_query_groups
        max_position_embeddings vocab_size make_vocab_size_divisible_by img_h img_w patch_dim num_channels num_classes
        base_hidden_size base_num_layers ngram_rows mixture_of_depths_every mixture_of_depths_strata
        tensor_model_parallel_size pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage
        micro_batch_size global_batch_size train_iters train_samples train_tokens train_epochs early_stopping_patience
        exit_interval loss_scale_window hysteresis lr_decay_iters lr_decay_samples lr_decay_tokens lr_wsd_decay_iters
        lr_wsd_decay_samples lr_wsd_decay_tokens mask_max_ngram save_interval save_retain_interval upload_retain
        log_interval eval_interval eval_tasks_interval eval_tasks_limit rotary_seq_len_interpolation_factor
        loss_spike_window"""),
    (Range(0), """
        min_lr decoupled_min_lr lr_warmup_iters lr_warmup_samples lr_warmup_tokens lr_warmup_init weight_decay clip_grad
        num_workers ckpt_step eval_iters skip_nonfinite"""),
    (Range(0, low_open=True), """
        norm_epsilon init_method_std distributed_timeout_minutes exit_duration_in_mins loss_scale initial_loss_scale
        min_loss_scale lr adam_eps muon_extra_scale_factor peak_tflops rope_scaling_factor z_loss_coeff
        decoupled_lr loss_spike_threshold"""),
    (BELOW_ONE, "hidden_dropout attention_dropout lr_warmup_fraction adam_beta1 adam_beta2 muon_momentum"),
    (Range(0, 1, low_open=True), "rotary_percent mixture_of_depths_capacity"),
    (Range(0, 1, low_open=True, high_open=True), "mask_prob"),
    (Range(0, 1), "short_seq_prob fim_rate fim_spm_rate fim_fragment_rate"),
    (Range(1, low_open=True), "rotary_base"),
    (Range(1, 99), "muon_num_ns_steps"),
    (Range(2, 16), "ngram_length qkv_conv_kernel"),
    (Range(0, 2**32, high_open=True), "seed"),
)
_MOST = {"num_layers": 10**4, "base_num_layers": 10**4, "num_attention_heads": 2**16, "num_query_groups": 2**16,
         "hidden_size": 2**20, "ffn_hidden_size": 2**23, "kv_channels": 2**16, "seq_length": 2**24,
         "max_position_embeddings": 2**24, "vocab_size": 2**24, "make_vocab_size_divisible_by": 2**20,
         "ngram_rows": 2**31, "micro_batch_size": 2**20, "global_batch_size": 2**20, "eval_iters": 10**6,
         "train_iters": 10**9, "train_samples": 10**12, "train_tokens": 10**16, "train_epochs": 10**6,
         "num_workers": 2**10, "distributed_timeout_minutes": 10**6, "exit_duration_in_mins": 10**9}
"""Far above what anything trains with; beyond them are slips, for which memory would be reserved or time would pass."""
RANGES: dict[str, Range] = {field: allowed._replace(high=_MOST.get(field, allowed.high))
                            for allowed, fields in _FIELDS for field in fields.split()} | {
    field: allowed for policy in POLICIES for field, allowed in policy.ranges.items()}
"""Allowed values of each number by field; None is allowed wherever it is the default."""

_STAND_INS = {"num_layers": 5040, "hidden_size": 5040 * 64, "num_attention_heads": 5040, "seq_length": 5040 * 64,
              "lr": 1.0}
"""Values of required settings that most others go with: divisible by every small number."""


def value_violations(config: RunConfig) -> Iterator[tuple[Flag, str]]:
    """Settings that are missing, or outside the range of what they mean, and what is wrong with them."""
    for flag in all_flags():
        value, allowed = flag.of(config), RANGES.get(flag.field)
        if flag.field in REQUIRED and value == flag.default:
            yield flag, f"{flag.name} is required: give {REQUIRED[flag.field]}"
        elif allowed is not None and value is not None and not allowed.holds(value):
            remedy = "" if flag.field in REQUIRED else ", or leave the flag out"
            if remedy and flag.default is not None:
                remedy += f" for {flag.default}"
            yield flag, f"{flag.spoken(value)}: must be {allowed}; give such a number{remedy}"


def repaired(config: RunConfig, flags: Iterable[Flag]) -> RunConfig:
    """The configuration with sound values of these settings, so that problems of the others can be found too."""
    return with_settings(config, {flag.field: _STAND_INS.get(flag.field, flag.default) for flag in flags})
