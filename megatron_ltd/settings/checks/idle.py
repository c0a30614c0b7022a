"""Settings that are given but have no effect because of another setting: reported once, since silence would mislead.

They are not errors, so that one command runs on several layouts, and with and without token dropping.
"""

from dataclasses import replace

from megatron_ltd.config.run import RunConfig
from megatron_ltd.settings.checks.rules import Row, given
from megatron_ltd.settings.flag_reference import all_flags
from megatron_ltd.token_drop.registry import idle_policy_settings


def idle_settings(config: RunConfig, *, finetuning: bool = False) -> list[str]:
    """One sentence for each setting that differs from its default and has no effect.

    Args:
        finetuning: the kept length grows even if the number of steps is not given.
    """
    drop = config.token_drop
    if finetuning and drop.random_ltd_steps is None and drop.random_ltd_length_list is None:
        drop = replace(drop, **{"random_ltd_steps": 1 if drop.policy == "random" else None})
    idle = [f"{flag.name} has no effect {reason}" for applies, fields, reason in _rows(config) if applies
            for flag in given(config, fields)]
    return idle + list(idle_policy_settings(drop))


def left_to_checkpoint(asked: RunConfig, taken: RunConfig) -> list[str]:
    """One sentence for each setting of the model that is given, but that --use-checkpoint-args takes from a checkpoint
    with another value.

    Args:
        asked, taken: the settings before and after.
    """
    if not asked.checkpoint.use_checkpoint_args:
        return []
    found = given(asked, " ".join(flag.field for flag in all_flags() if flag.section == "model"))
    return [f"{flag.spoken(flag.of(asked))} has no effect with --use-checkpoint-args: the checkpoint's model has "
            f"{'none' if flag.of(taken) is None else flag.spoken(flag.of(taken))}"
            for flag in found if flag.of(taken) != flag.of(asked)]


def _rows(config: RunConfig) -> tuple[Row, ...]:
    """Whether a rule applies, the settings that then have no effect, and why."""
    model, parallel, training, data = config.model, config.parallel, config.training, config.data
    optimizer, checkpoint = config.optimizer, config.checkpoint
    bert, lines = model.family == "bert", data.train_jsonl is not None
    return (
        (parallel.tensor_model_parallel_size == 1, "sequence_parallel", "with --tensor-model-parallel-size = 1"),
        (parallel.pipeline_model_parallel_size == 1, "pipeline_schedule num_layers_per_virtual_pipeline_stage",
         "with --pipeline-model-parallel-size = 1"),
        (parallel.pipeline_model_parallel_size == 1 and parallel.pipeline_split == "auto", "pipeline_split",
         "with --pipeline-model-parallel-size = 1"),
        (parallel.recompute_granularity == "full", "recompute_activations",
         "with --recompute-granularity = full, which recomputes more"),
        (model.num_query_groups is None, "group_query_attention", "without --num-query-groups"),
        (model.position_embedding_type != "rope", "rotary_base rotary_percent use_rope_scaling "
         "rotary_seq_len_interpolation_factor rope_scaling no_rope_freq",
         f"with --position-embedding-type = {model.position_embedding_type}"),
        (model.position_embedding_type in ("alibi", "none"), "reset_position_ids",
         f"with --position-embedding-type = {model.position_embedding_type}"),
        (not model.use_rope_scaling, "rope_scaling_factor", "without --use-rope-scaling"),
        (model.window_size is None, "window_attn_skip_freq", "without --window-size"),
        (not model.qk_layernorm, "qk_layernorm_all_heads", "without --qk-layernorm"),
        (model.mixture_of_depths_capacity is None, "mixture_of_depths_every mixture_of_depths_strata",
         "without --mixture-of-depths-capacity"),
        (not model.disable_bias_linear, "add_qkv_bias add_proj_bias add_mlp_bias",
         "without --disable-bias-linear: the projection has biases already"),
        (bert and data.mask_geometric, "mask_longer_ngrams", "with --mask-geometric, which draws the lengths"),
        (not bert and not lines, "prompt_key response_key messages_key chat_template overlong_samples",
         "without --train-jsonl"),
        (not bert and lines, "split reset_position_ids reset_attention_mask eod_mask_loss data_cache_path",
         "with --train-jsonl, whose samples are packed by rules of their own"),
        (not bert, "mask_prob mask_max_ngram mask_whole_word mask_longer_ngrams mask_geometric short_seq_prob",
         "on GPT, which predicts every token"),
        (bert, "bos_token eod_token", "on BERT, whose samples have tokens of their own around them"),
        (data.tokenizer_type != "SentencePieceTokenizer", "tokenizer_control_symbols",
         f"with --tokenizer-type = {data.tokenizer_type}, which reads the names of special tokens as these tokens"),
        (data.fim_data and data.fim_split_sample is None, "fim_fragment_rate", "without --fim-split-sample"),
        (training.train_tokens is None, "token_budget", "without --train-tokens"),
        (not training.fp16, "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
         "without --fp16"),
        (training.on_loss_spike is None, "loss_spike_window loss_spike_threshold", "without --on-loss-spike"),
        (optimizer.lr_decay_style != "WSD",
         "lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_tokens",
         "without --lr-decay-style WSD"),
        (optimizer.decoupled_lr is None, "decoupled_min_lr", "without --decoupled-lr"),
        (optimizer.optimizer != "muon", "muon_momentum muon_nesterov muon_num_ns_steps muon_scale_mode "
         "muon_extra_scale_factor muon_split_qkv muon_precision", "without --optimizer muon"),
        (optimizer.optimizer == "sgd", "adam_beta1 adam_beta2 adam_eps", "with --optimizer = sgd"),
        (checkpoint.save is None, "save_interval async_save no_save_optim upload", "without --save: nothing is saved"),
        (checkpoint.upload is None, "upload_retain", "without --upload"),
        (not data.multiple_validation_sets, "validation_set_names", "without --multiple-validation-sets"),
        (not data.validation_paths, "multiple_validation_sets", "without --valid-data-path, which names the sets"),
        (data.mock_data, "full_validation", "with --mock-data, which has no end"),
        (config.logging.full_validation and not data.mock_data, "eval_iters",
         "on validation with --full-validation, which reads all of it"),
        (config.logging.full_validation and config.logging.eval_iters == 0, "test_data_path test_jsonl",
         "with --eval-iters = 0: --full-validation is about validation sets"),
        (config.logging.eval_tasks is None, "eval_tasks_interval eval_tasks_limit task_data", "without --eval-tasks"),
        (checkpoint.load is None, "no_load_optim load_fallback", "without --load"),
        (not checkpoint.finetune and checkpoint.pretrained_checkpoint is None, "resize_vocabulary",
         "without --finetune or --pretrained-checkpoint: the run goes on with the rows that its model has"),
    )
