"""What settings exclude or require of each other, as tables: settings that another setting, the model or the recipe
rules out, and settings that must not exceed another."""

from collections.abc import Iterable, Iterator

from megatron_ltd.config.run import RunConfig
from megatron_ltd.model.arithmetic.rope_scaling import rope_scaling
from megatron_ltd.settings.flag_reference import Flag, flags_by_field

Row = tuple[bool, str, str]
"""Whether a rule applies, the fields that it is about, and what is said of those that are given."""


def given(config: RunConfig, fields: str) -> list[Flag]:
    """The settings among these that differ from their defaults."""
    flags = [flags_by_field()[field] for field in fields.split()]
    return [flag for flag in flags if flag.of(config) != flag.default]


def _excluded(config: RunConfig, rows: Iterable[Row]) -> Iterator[str]:
    for applies, fields, reason in rows:
        if applies:
            yield from (f"{flag.spoken(flag.of(config))} is given {reason}" for flag in given(config, fields))


def excluded_settings(config: RunConfig) -> Iterator[str]:
    """Settings that are given although others rule them out."""
    model, data, vit = config.model, config.data, config.model.family == "vit"
    yield from _excluded(config, (
        (model.family == "gpt", "bert_no_binary_head",
         "in a GPT run; leave it out, or use megatron_ltd.pretrain_bert"),
        (model.family == "bert", "reset_position_ids eod_mask_loss reset_attention_mask",
         "for BERT, whose samples are not cut out of a stream of documents; leave it out"),
        (not vit, "img_h img_w patch_dim num_channels num_classes image_augmentation",
         "in a run without ViT; leave it out, or use megatron_ltd.finetune_vit"),
        (vit, "data_path train_jsonl mock_data tokenizer_type",
         "for ViT, which reads images; leave it out, and name them by --train-data-path"),
        (vit, "pipeline_model_parallel_size", "for ViT, which runs with tensor and data parallelism; leave it out"),
        (vit, "multiple_validation_sets validation_set_names", "for ViT, which has one validation set; leave it out"),
        (vit, "position_embedding_type", "for ViT, which learns positions; leave it out"),
        (vit, "decoupled_lr embed_layernorm", "for ViT, which has no word embedding; leave it out"),
        (model.family == "bert" and model.position_embedding_type == "alibi", "position_embedding_type",
         "for BERT, which attends in both directions; choose learned_absolute, rope or none"),
        (model.family != "gpt", "fim_data", "for a model that is not a GPT; leave it out"),
        (data.mock_data or data.train_jsonl is not None or data.tokenizer_type == "NullTokenizer", "fim_data",
         "without a corpus of text to rearrange; name one with --data-path and its tokenizer, or leave it out"),
        (not data.fim_data, "fim_rate fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix fim_prefix_token "
         "fim_middle_token fim_suffix_token fim_pad_token fim_eod_token",
         "without --fim-data, which rearranges documents; add that, or leave it out"),
        (not vit and data.train_jsonl is None, "valid_jsonl test_jsonl",
         "without --train-jsonl: there is nothing to train on; add it"),
        (not model.group_query_attention, "num_query_groups",
         "without --group-query-attention: each query head has its own keys and values; add that, or leave it out"),
        (model.parametrization == "standard", "base_hidden_size base_num_layers",
         "without --parametrization completep: no other depends on a base model; add that, or leave it out"),
        (model.family != "gpt", "parametrization z_loss_coeff", "for a model that is not a GPT; leave it out"),
        (model.family != "gpt", "ngram_rows qkv_conv_kernel",
         "for a model that is not a GPT, whose tokens follow on each other; leave it out"),
        (model.ngram_rows is None, "ngram_length",
         "without --ngram-rows: there is no table; add that, or leave it out"),
        (model.family != "gpt", "mixture_of_depths_capacity",
         "for a model that is not a GPT, whose next tokens its routers are made for; leave it out"),
        (model.family != "gpt", "eval_tasks", "for a model that predicts no next token; leave it out"),
        (data.tokenizer_type in (None, "NullTokenizer"), "eval_tasks",
         "without a tokenizer of texts; name the corpus's with --tokenizer-type, or leave it out"),
        (model.swiglu, "openai_gelu", "with --swiglu: the MLP has one activation; leave one of them out"),
        (config.training.bf16, "fp16", "with --bf16: a run computes in one precision; leave one of them out"),
        (config.checkpoint.load is None, "finetune use_checkpoint_args ckpt_step",
         "without --load: there is no checkpoint to take; add --load DIR"),
        (config.token_drop.token_superposition is not None, "reset_position_ids reset_attention_mask",
         f"with --token-superposition = {config.token_drop.token_superposition}: a bag may hold tokens of two "
         "documents; leave one of them out"),
    ))


def pretraining_violations(config: RunConfig) -> Iterator[str]:
    """Settings that only the finetuning recipes can use."""
    return _excluded(config, [(True, "train_epochs early_stopping_patience pretrained_checkpoint train_jsonl "
                                     "valid_jsonl test_jsonl",
                               "in a pretraining run; leave it out, or use megatron_ltd.finetune_gpt")])


def finetuning_violations(config: RunConfig) -> Iterator[str]:
    """Settings that finetuning cannot use, or uses together with others only."""
    yield from _excluded(config, [
        (True, "mock_data", "in finetuning, which needs a training set; name one, or use a pretraining recipe"),
        (True, "token_superposition", "in finetuning: the model would unlearn to predict single tokens; leave it out"),
        (not _has_validation(config), "early_stopping_patience",
         "without a validation set that says when to stop; add --valid-jsonl or --valid-data-path, and leave "
         "--eval-iters above 0")])
    for flag in given(config, "train_data_path data_path"):
        if weighted(flag.of(config)):
            yield (f"{flag.spoken(flag.of(config))}: with weights there is no epoch, which finetuning reads whole; "
                   "name the corpora without weights")


def _has_validation(config: RunConfig) -> bool:
    data = config.data
    shares = data.split.split(",")
    in_split = data.data_path is not None and len(shares) > 1 and shares[1].strip() not in ("", "0", "0.0")
    return config.logging.evaluates and (in_split or data.valid_data_path is not None
                                              or data.valid_jsonl is not None)


def weighted(values: tuple[str, ...]) -> bool:
    """Whether they are WEIGHT PREFIX pairs of several corpora."""
    try:
        return len(values) > 2 and len(values) % 2 == 0 and all(float(value) >= 0 for value in values[::2])
    except ValueError:
        return False


def exceeded_limits(config: RunConfig) -> Iterator[str]:
    """Settings above another that is their limit."""
    flags = flags_by_field()
    limits = [("min_lr", "lr"), ("lr_warmup_init", "lr"), ("lr_warmup_init", "decoupled_lr"),
              ("min_lr" if config.optimizer.decoupled_min_lr is None else "decoupled_min_lr", "decoupled_lr")]
    scaling = rope_scaling(config.model)
    if scaling is None or scaling.kind != "dynamic":  # which is for samples beyond the positions
        limits.append(("seq_length", "max_position_embeddings"))
    if config.training.fp16:
        limits.append(("min_loss_scale", "initial_loss_scale"))
    for field, limit in limits:
        low, high = flags[field].of(config), flags[limit].of(config)
        if high is not None and low > high:
            yield (f"{flags[field].spoken(low)}: more than {flags[limit].spoken(high)}; choose at most that, or raise "
                   f"{flags[limit].name}")
