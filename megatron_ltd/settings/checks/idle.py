"""Settings that are given but change nothing, because of another setting: said once, since silence would mislead.

They are no errors, so that one command runs on several layouts, and with and without token dropping.
"""

from dataclasses import replace

from megatron_ltd.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenDropConfig, TrainingConfig


def idle_settings(config: RunConfig, *, finetuning: bool = False) -> list[str]:
    """One sentence for each setting that differs from its default and has no effect.

    Args:
        finetuning: the kept length grows even if it is not said for how long.
    """
    drop = config.token_drop
    if finetuning and drop.random_ltd_steps is None and drop.random_ltd_length_list is None:
        drop = replace(drop, random_ltd_steps=1 if drop.policy == "random" else None)
    return [*_idle_layout(config), *_idle_token_drop(drop), *_idle_model(config.model),
            *_idle_data(config), *_idle_training(config.training), *_idle_optimizer(config.optimizer),
            *_idle_checkpoint(config)]


def _idle_layout(config: RunConfig) -> list[str]:
    parallel = config.parallel
    idle = []
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        idle.append("--sequence-parallel has no effect with --tensor-model-parallel-size = 1")
    if parallel.pipeline_model_parallel_size == 1:
        given = {"--pipeline-schedule": parallel.pipeline_schedule != "1f1b",
                 "--num-layers-per-virtual-pipeline-stage": parallel.num_layers_per_virtual_pipeline_stage is not None,
                 "--pipeline-split = auto": parallel.pipeline_split == "auto"}
        idle += [f"{flag} has no effect with --pipeline-model-parallel-size = 1" for flag in given if given[flag]]
    if parallel.recompute_activations and parallel.recompute_granularity == "full":
        idle.append("--recompute-activations has no effect with --recompute-granularity = full, which recomputes more")
    return idle


def _idle_token_drop(token_drop: TokenDropConfig) -> list[str]:
    default = TokenDropConfig()
    importance = ("token_drop_no_cross_layer", "token_drop_beta", "token_drop_initial_importance",
                  "token_drop_always_keep_ids", "token_drop_always_drop_ids")
    idle = [f"--{field.replace('_', '-')} has no effect without --token-drop-policy importance"
            for field in importance if token_drop.policy != "importance" and
            getattr(token_drop, field) != getattr(default, field)]
    return idle + _idle_schedule(token_drop) + _idle_comparison(token_drop)


def _idle_comparison(token_drop: TokenDropConfig) -> list[str]:
    idle = []
    if token_drop.layer_drop_rate == 0.0 and token_drop.layer_drop_layers is not None:
        idle.append("--layer-drop-layers has no effect without --layer-drop-rate: no layer is skipped")
    if token_drop.seq_length_curriculum_start_length is None and \
            token_drop.seq_length_curriculum_length_step != TokenDropConfig().seq_length_curriculum_length_step:
        idle.append("--seq-length-curriculum-length-step has no effect without --seq-length-curriculum-start-length: "
                    "samples are read whole")
    return idle


def _idle_schedule(token_drop: TokenDropConfig) -> list[str]:
    default = TokenDropConfig()
    if token_drop.policy != "none":
        if token_drop.random_ltd_steps is not None:
            return []
        return [f"--{field.replace('_', '-')} has no effect without --random-ltd-steps: the kept length does not grow"
                for field in ("random_ltd_length_step", "random_ltd_root_degree")
                if getattr(token_drop, field) != getattr(default, field)]
    fields = ("random_ltd_start_length", "random_ltd_steps", "random_ltd_length_step", "random_ltd_root_degree",
              "random_ltd_length_list", "random_ltd_layers", "random_ltd_strata")
    return [f"--{field.replace('_', '-')} has no effect without --random-ltd: no token is dropped"
            for field in fields if getattr(token_drop, field) != getattr(default, field)]


def _idle_model(model: ModelConfig) -> list[str]:
    idle = []
    if model.group_query_attention and model.num_query_groups is None:
        idle.append("--group-query-attention has no effect without --num-query-groups")
    if model.position_embedding_type != "rope":
        idle += [f"{flag} has no effect with --position-embedding-type = {model.position_embedding_type}"
                 for flag, given in (("--rotary-base", model.rotary_base != ModelConfig().rotary_base),
                                     ("--rotary-percent", model.rotary_percent != 1.0)) if given]
    if model.add_qkv_bias and not model.disable_bias_linear:
        idle.append("--add-qkv-bias has no effect without --disable-bias-linear: the projection has biases already")
    return idle


def _idle_data(config: RunConfig) -> list[str]:
    data, default = config.data, DataConfig()
    if config.model.family == "bert":
        return ["--mask-longer-ngrams has no effect with --mask-geometric, which draws the lengths"] \
            if data.mask_geometric and data.mask_longer_ngrams else []
    idle = _idle_lines(data)
    fields = ("mask_prob", "mask_max_ngram", "mask_whole_word", "mask_longer_ngrams", "mask_geometric",
              "short_seq_prob")
    return idle + [f"--{field.replace('_', '-')} has no effect on GPT, which predicts every token"
                   for field in fields if getattr(data, field) != getattr(default, field)]


def _idle_lines(data: DataConfig) -> list[str]:
    """What packs prompts and responses, or cuts a corpus, and nothing else."""
    default = DataConfig()
    if data.train_jsonl is None:
        return [f"--{field.replace('_', '-')} has no effect without --train-jsonl"
                for field in ("prompt_key", "response_key", "overlong_samples")
                if getattr(data, field) != getattr(default, field)]
    return [f"--{field.replace('_', '-')} has no effect with --train-jsonl, whose samples are packed by rules of "
            "their own"
            for field in ("split", "reset_position_ids", "reset_attention_mask", "eod_mask_loss", "data_cache_path")
            if getattr(data, field) != getattr(default, field)]


def _idle_training(training: TrainingConfig) -> list[str]:
    default = TrainingConfig()
    idle = []
    if training.token_budget != default.token_budget and training.train_tokens is None:
        idle.append(f"--token-budget = {training.token_budget} has no effect without --train-tokens")
    if training.fp16:
        return idle
    fields = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    return idle + [f"--{field.replace('_', '-')} has no effect without --fp16"
                   for field in fields if getattr(training, field) != getattr(default, field)]


def _idle_optimizer(optimizer: OptimizerConfig) -> list[str]:
    default = OptimizerConfig()
    idle = []
    if optimizer.lr_decay_style != "WSD":
        fields = ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_tokens")
        idle += [f"--{field.replace('_', '-')} has no effect without --lr-decay-style WSD"
                 for field in fields if getattr(optimizer, field) != getattr(default, field)]
    if optimizer.optimizer == "sgd":
        idle += [f"--{field.replace('_', '-')} has no effect with --optimizer = sgd"
                 for field in ("adam_beta1", "adam_beta2", "adam_eps")
                 if getattr(optimizer, field) != getattr(default, field)]
    if optimizer.optimizer != "muon":
        idle += [f"--{field.replace('_', '-')} has no effect without --optimizer muon"
                 for field in ("muon_momentum", "muon_nesterov", "muon_num_ns_steps", "muon_scale_mode",
                               "muon_extra_scale_factor", "muon_split_qkv", "muon_precision")
                 if getattr(optimizer, field) != getattr(default, field)]
    return idle


def _idle_checkpoint(config: RunConfig) -> list[str]:
    checkpoint = config.checkpoint
    idle = []
    if checkpoint.save is None:
        idle += [f"{flag} has no effect without --save" for flag, given in
                 (("--async-save", checkpoint.async_save), ("--no-save-optim", checkpoint.no_save_optim)) if given]
    if checkpoint.load is None and checkpoint.no_load_optim:
        idle.append("--no-load-optim has no effect without --load")
    return idle
