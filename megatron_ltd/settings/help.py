"""What --help prints: the flags that most runs use, by what they are for; --help-all prints all those of a recipe."""

import textwrap
from collections.abc import Iterator

from megatron_ltd.config.model import Family
from megatron_ltd.settings.flag_reference import Flag, all_flags, flags_by_field, section_classes

USUAL = {
    "Model": "num_layers hidden_size num_attention_heads seq_length position_embedding_type img_h img_w patch_dim "
             "num_classes use_checkpoint_args",
    "Data": "data_path mock_data train_jsonl valid_jsonl train_data_path valid_data_path image_augmentation "
            "tokenizer_type vocab_file merge_file tokenizer_model vocab_size",
    "Length and batch": "train_iters train_tokens train_epochs micro_batch_size global_batch_size",
    "Learning rate": "lr min_lr lr_decay_style lr_warmup_iters",
    "Token dropping": "random_ltd random_ltd_start_length random_ltd_steps token_drop_policy",
    "Processes and precision": "bf16 tensor_model_parallel_size pipeline_model_parallel_size use_distributed_optimizer",
    "Checkpoints": "save load pretrained_checkpoint save_interval exit_interval",
    "Log": "log_interval eval_interval eval_iters eval_tasks eval_tasks_interval metrics_file",
}
"""Fields by purpose; each recipe shows its own."""

OTHERS = (
    ({"bert", "vit"}, "train_jsonl valid_jsonl test_jsonl prompt_key response_key messages_key chat_template "
                      "overlong_samples reset_position_ids reset_attention_mask eod_mask_loss bos_token "
                      "eod_token"),
    ({"gpt", "vit"}, "bert_no_binary_head mask_prob mask_max_ngram mask_whole_word mask_longer_ngrams mask_geometric "
                     "short_seq_prob"),
    ({"bert", "vit"}, "ngram_rows ngram_length qkv_conv_kernel eval_tasks eval_tasks_interval eval_tasks_limit "
                      "task_data"),
    ({"gpt", "bert"}, "img_h img_w patch_dim num_channels num_classes image_augmentation"),
    ({"vit"}, "seq_length max_position_embeddings position_embedding_type rotary_base rotary_percent vocab_size "
              "make_vocab_size_divisible_by untie_embeddings_and_output_weights data_path split data_cache_path "
              "tokenizer_type tokenizer_model vocab_file merge_file pipeline_model_parallel_size "
              "num_layers_per_virtual_pipeline_stage pipeline_schedule pipeline_split "
              "seq_length_curriculum_start_length seq_length_curriculum_steps seq_length_curriculum_length_step "
              "token_drop_no_cross_layer token_drop_beta token_drop_initial_importance token_drop_always_keep_ids "
              "token_drop_always_drop_ids use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor "
              "rope_scaling no_rope_freq tokenizer_control_symbols"),
    ({"pretraining"}, "train_epochs early_stopping_patience pretrained_checkpoint train_jsonl valid_jsonl test_jsonl "
                      "prompt_key response_key messages_key chat_template overlong_samples"),
    ({"finetuning"}, "mock_data"),
)
"""Families or kinds of runs, and the fields that are of no use to them."""

OPENING = """Every setting is a flag, or a key of --config FILE.toml (with underscores, flat or under [section]).
Flags override the file. A switch that the file turns on is turned off by --no-<name>.
"""
FILES = """
  --config FILE.toml
      Settings that flags may override.
  --deepspeed-config FILE.json
      DeepSpeed's configuration: random-LTD, layer dropping, batch sizes, precision, clipping and ZeRO stage
      are taken from it; flags override it.
  --recipe NAME
      A named set of settings, printed in full, that files and flags override: muon, muon-conv,
      muon-conv-ngram, muon-ngram.
"""


def recipe_flags(family: Family, *, finetuning: bool) -> list[Flag]:
    """The flags that a recipe can use."""
    kinds = {family, "finetuning" if finetuning else "pretraining"}
    useless = {field for whose, fields in OTHERS if kinds & whose for field in fields.split()}
    return [flag for flag in all_flags() if flag.field not in useless]


def usual_help(family: Family, *, finetuning: bool) -> str:
    """The flags that most runs use, each with the first sentence of its documentation."""
    known = recipe_flags(family, finetuning=finetuning)
    lines = [OPENING]
    for group, fields in USUAL.items():
        flags = [flag for field in fields.split() if (flag := flags_by_field()[field]) in known]
        lines += [group, *(line for flag in flags for line in _entry(flag, _gist(flag, family))), ""]
    return "\n".join([*lines, f"--help-all shows all {len(known)} flags of this program; docs/flags.md has those of "
                              "every program.\n"])


def whole_help(family: Family, *, finetuning: bool) -> str:
    """Every flag of a recipe with its default and its documentation, by section."""
    known = recipe_flags(family, finetuning=finetuning)
    lines = [OPENING + FILES.rstrip()]
    for section, kind in section_classes().items():
        lines += ["", f"[{section}]  {' '.join((kind.__doc__ or '').split())}"]
        lines += [line for flag in known if flag.section == section for line in _entry(flag, flag.text)]
    return "\n".join(lines) + "\n"


def _gist(flag: Flag, family: Family) -> str:
    """The first sentence of its documentation, or of the part that is about ViT."""
    _, _, of_vit = flag.text.partition("For ViT: ")
    text = of_vit if family == "vit" and of_vit else flag.text
    return (text[0].upper() + text[1:] if of_vit else text).split(". ")[0].rstrip(".") + "."


def _entry(flag: Flag, text: str) -> Iterator[str]:
    yield f"  {flag.usage}" + (f" [{flag.default_text}]" if flag.default_text else "")
    yield textwrap.indent(textwrap.fill(text, 100), "      ")
