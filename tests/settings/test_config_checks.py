"""Settings that cannot run are refused before anything starts, each with setting, constraint and remedy."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.settings.checks.all import check, notes, violations
from megatron_ltd.settings.checks.idle import idle_settings
from megatron_ltd.settings.checks.values import RANGES
from megatron_ltd.settings.flag_reference import Flag, all_flags
from tests.runnable_settings import RUNNABLE, with_settings

INTERLEAVED = {"pipeline_schedule": "interleaved", "num_layers_per_virtual_pipeline_stage": 3}
CORPUS = ("a",)

ROPE: dict[str, Any] = {"position_embedding_type": "rope"}

SETS: dict[str, Any] = {"data_path": None, "train_data_path": CORPUS, "valid_data_path": ("a", "b")}
REFUSED: list[tuple[dict[str, Any], int, list[str]]] = [
    # what has to be given, and single values
    ({"num_layers": 0}, 1, ["--num-layers is required"]),
    ({"hidden_size": 0}, 1, ["--hidden-size is required"]),
    ({"num_attention_heads": 0}, 1, ["--num-attention-heads is required"]),
    ({"seq_length": 0}, 1, ["--seq-length is required"]),
    ({"lr": None}, 1, ["--lr is required"]),
    ({"ngram_rows": 0}, 1, ["--ngram-rows = 0", "at least 1"]),
    ({"ngram_rows": 64, "ngram_length": 1}, 1, ["--ngram-length = 1"]),
    ({"ngram_length": 3}, 1, ["--ngram-length = 3", "without --ngram-rows"]),
    ({"ngram_rows": 63, "tensor_model_parallel_size": 2}, 2, ["--ngram-rows = 63", "choose 62 or 64"]),
    ({"qkv_conv_kernel": 1}, 1, ["--qkv-conv-kernel = 1", "at least 2"]),
    ({"num_layers": -4}, 1, ["--num-layers = -4", "at least 1"]),
    ({"seq_length": -1}, 1, ["--seq-length = -1"]),
    ({"micro_batch_size": 0}, 1, ["--micro-batch-size = 0", "leave the flag out for 1"]),
    ({"tensor_model_parallel_size": 0}, 1, ["--tensor-model-parallel-size = 0"]),
    ({"random_ltd_steps": 0}, 1, ["--random-ltd-steps = 0"]),
    ({"random_ltd_steps": -7}, 1, ["--random-ltd-steps = -7"]),
    ({"random_ltd_start_length": 0}, 1, ["--random-ltd-start-length = 0", "at least 1"]),
    ({"random_ltd_length_step": 0}, 1, ["--random-ltd-length-step = 0"]),
    ({"random_ltd_strata": 0}, 1, ["--random-ltd-strata = 0"]),
    ({"random_ltd_root_degree": 0}, 1, ["--random-ltd-root-degree = 0", "at least 1"]),
    ({"random_ltd_length_list": "0:64,9:32", "random_ltd_start_length": None, "random_ltd_steps": None,
      "layer_token_lr": True, "lr_warmup_iters": 0}, 1, ["--random-ltd-length-list = '0:64,9:32'", "never falling"]),
    ({"random_ltd_length_list": "0:64"}, 1,
     ["--random-ltd-length-list = 0:64", "--random-ltd-start-length = 64", "--random-ltd-steps = 50", "keep one"]),
    ({"random_ltd_length_list": "0:64,9:257", "random_ltd_start_length": None, "random_ltd_steps": None}, 1,
     ["a length of --random-ltd-length-list = 257", "--seq-length = 256"]),
    ({"random_ltd_length_list": "0:64,9:129", "random_ltd_start_length": None, "random_ltd_steps": None,
      "random_ltd_strata": 2}, 1, ["a length of --random-ltd-length-list = 129", "--random-ltd-strata = 2"]),
    ({"train_iters": None, "train_tokens": 3839, "token_budget": "layer", "lr_warmup_iters": 0}, 1,
     ["--train-tokens = 3839", "less than one global batch"]),
    ({"iterations_to_skip": (4, -3)}, 1, ["--iterations-to-skip = -3", "counted from 0"]),
    ({"skip_nonfinite": -1}, 1, ["--skip-nonfinite = -1", "at least 0"]),
    ({"on_loss_spike": "skip"}, 1, ["--on-loss-spike = skip", "--save and --save-interval"]),
    ({"on_loss_spike": "skip", "save": "a", "save_interval": 5, "no_save_optim": True}, 1,
     ["--on-loss-spike = skip", "--no-save-optim"]),
    ({"on_loss_spike": "warn", "loss_spike_window": 0}, 1, ["--loss-spike-window = 0", "at least 1"]),
    ({"on_loss_spike": "warn", "loss_spike_threshold": 0.0}, 1, ["--loss-spike-threshold = 0.0", "above 0"]),
    ({"token_drop_policy": "importance"}, 1, ["--random-ltd", "--token-drop-policy = importance", "one policy"]),
    ({"random_ltd": False, "token_drop_policy": "importance", "random_ltd_layers": "0-22"}, 1,
     ["--random-ltd-layers = 0-22", "first layer"]),
    ({"random_ltd": False, "token_drop_policy": "importance", "token_drop_always_keep_ids": (5, 7),
      "token_drop_always_drop_ids": (7,)}, 1, ["--token-drop-always-keep-ids", "both name 7"]),
    ({"random_ltd": False, "token_drop_policy": "importance", "token_drop_beta": 1.0}, 1,
     ["--token-drop-beta = 1.0", "below 1"]),
    ({"family": "bert", "random_ltd": False, "token_drop_policy": "importance", "random_ltd_start_length": 40}, 1,
     ["40 kept tokens", "38 masked tokens", "at least 41"]),
    ({"family": "bert", "reset_attention_mask": True}, 1, ["--reset-attention-mask"]),
    ({"bert_no_binary_head": True}, 1, ["--bert-no-binary-head"]),
    ({"mask_prob": 0.0}, 1, ["--mask-prob = 0.0", "above 0"]),
    ({"hidden_dropout": 1.0}, 1, ["--hidden-dropout = 1.0", "below 1"]),
    ({"attention_dropout": -0.1}, 1, ["--attention-dropout = -0.1"]),
    ({"lr": 0.0}, 1, ["--lr = 0.0", "above 0"]),
    ({"lr": -1e-3}, 1, ["--lr = -0.001"]),
    ({"seed": 2**32}, 1, ["--seed = 4294967296", "below 4294967296"]),
    ({"eval_iters": -1}, 1, ["--eval-iters = -1"]),
    ({"eval_interval": 0}, 1, ["--eval-interval = 0"]),
    ({"log_interval": 0}, 1, ["--log-interval = 0"]),
    ({"fp16": True, "loss_scale": 0.0}, 1, ["--loss-scale = 0.0", "above 0"]),
    ({"fp16": True, "loss_scale": -8.0}, 1, ["--loss-scale = -8.0"]),
    ({"fp16": True, "initial_loss_scale": 2.0, "min_loss_scale": 4.0}, 1,
     ["--min-loss-scale = 4", "--initial-loss-scale"]),
    ({"adam_beta2": 1.0}, 1, ["--adam-beta2 = 1.0"]),
    ({"muon_momentum": 1.0}, 1, ["--muon-momentum = 1.0: must be at least 0 and below 1"]),
    ({"muon_num_ns_steps": 0}, 1, ["--muon-num-ns-steps = 0: must be at least 1"]),
    ({"muon_extra_scale_factor": 0.0}, 1, ["--muon-extra-scale-factor = 0.0: must be above 0"]),
    ({"clip_grad": -1.0}, 1, ["--clip-grad = -1.0"]),
    # the model
    ({"hidden_size": 100}, 1, ["--hidden-size = 100", "--num-attention-heads = 12", "108"]),
    ({"group_query_attention": True, "num_query_groups": 5}, 1,
     ["--num-query-groups = 5", "--num-attention-heads = 12"]),
    ({"num_query_groups": 4}, 1, ["--num-query-groups = 4", "--group-query-attention"]),
    ({"seq_length": 512, "max_position_embeddings": 256}, 1, ["--seq-length = 512", "--max-position-embeddings = 256"]),
    ({"position_embedding_type": "rope", "kv_channels": 7}, 1, ["rope", "7 channels", "even"]),
    ({"position_embedding_type": "rope", "rotary_percent": 0.1}, 1, ["--rotary-percent = 0.1", "0.25"]),
    ({"swiglu": True, "openai_gelu": True}, 1, ["--openai-gelu", "--swiglu"]),
    ({"swiglu": True, "hidden_size": 12}, 1, ["--hidden-size = 12", "--ffn-hidden-size"]),
    ({**ROPE, "use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}, 1,
     ["--use-rope-scaling and --rotary-seq-len-interpolation-factor are given", "keep one"]),
    ({**ROPE, "rope_scaling": "{"}, 1, ["--rope-scaling = {: no JSON"]),
    ({**ROPE, "rope_scaling": '{"type": "yarn"}'}, 1, ["would change with --seq-length", "--max-position-embeddings"]),
    ({**ROPE, "rope_scaling": '{"type": "longrope", "short_factor": [1], "long_factor": [2], "factor": 2, '
                              '"original_max_position_embeddings": 64}'}, 1, ["short_factor has 1 numbers: must have"]),
    ({"window_size": (7, 1)}, 1, ["--window-size = 7 1", "0 later ones"]),
    ({"family": "bert", "window_size": (7, 0)}, 1, ["--window-size = 7 0", "leave it out"]),
    ({"window_size": (7, 0), "window_attn_skip_freq": (1, 0)}, 1, ["--window-attn-skip-freq = 1 0", "24 layers"]),
    ({**ROPE, "no_rope_freq": (0,)}, 1, ["--no-rope-freq = 0: must be one number of at least 1"]),
    ({"qk_layernorm": True, "qk_layernorm_all_heads": True}, 1, ["--qk-layernorm-all-heads", "RMSNorm"]),
    ({"z_loss_coeff": 0.0}, 1, ["--z-loss-coeff = 0.0: must be above 0"]),
    ({"family": "bert", "z_loss_coeff": 1e-4}, 1, ["--z-loss-coeff = 0.0001", "not a GPT"]),
    ({"decoupled_lr": 1e-5, "min_lr": 2e-5}, 1, ["--min-lr = 2e-05: more than --decoupled-lr = 1e-05"]),
    ({"decoupled_lr": 1e-5, "decoupled_min_lr": 2e-5}, 1, ["--decoupled-min-lr = 2e-05: more than --decoupled-lr"]),
    ({"family": "bert", "position_embedding_type": "alibi"}, 1, ["--position-embedding-type = alibi", "rope or none"]),
    ({"fim_rate": 0.9}, 1, ["--fim-rate = 0.9 is given without --fim-data"]),
    ({"fim_data": True, "mock_data": True, "data_path": None}, 1, ["--fim-data", "without a corpus of text"]),
    # tensor parallelism
    ({"tensor_model_parallel_size": 8}, 8,
     ["--num-attention-heads = 12", "--tensor-model-parallel-size = 8", "8 or 16"]),
    ({"tensor_model_parallel_size": 4, "ffn_hidden_size": 102}, 4, ["--ffn-hidden-size = 102", "100 or 104"]),
    ({"tensor_model_parallel_size": 4, "group_query_attention": True, "num_query_groups": 6}, 4,
     ["--num-query-groups = 6: neither a multiple nor a divisor", "--tensor-model-parallel-size = 4", "choose 2 or 4"]),
    ({"tensor_model_parallel_size": 4, "group_query_attention": True, "num_query_groups": 1, "kv_channels": 6}, 4,
     ["--num-query-groups = 1", "6 channels", "more groups"]),
    ({"tensor_model_parallel_size": 4, "make_vocab_size_divisible_by": 2, "vocab_size": 1001}, 4,
     ["--make-vocab-size-divisible-by = 2", "1002", "--make-vocab-size-divisible-by 4"]),
    ({"tensor_model_parallel_size": 3, "sequence_parallel": True, "random_ltd_strata": 3, "random_ltd_start_length": 48,
      "random_ltd_length_step": 3, "vocab_size": None}, 3, ["--seq-length = 256", "--sequence-parallel", "255 or 258"]),
    # pipeline parallelism
    ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}, 8, ["8 processes", "multiple of 6"]),
    ({"num_layers": 3, "pipeline_model_parallel_size": 4}, 4, ["--num-layers = 3", "4 stages"]),
    ({"num_layers": 7, "pipeline_model_parallel_size": 4, "pipeline_schedule": "zbv"}, 4,
     ["--num-layers = 7", "8 stages"]),
    ({"pipeline_model_parallel_size": 4, "pipeline_split": "6,6,6"}, 4, ["--pipeline-split = 6,6,6", "give 4 numbers"]),
    ({"pipeline_model_parallel_size": 4, "pipeline_split": "6,6,6,5"}, 4, ["23 layers", "--num-layers = 24"]),
    ({"pipeline_model_parallel_size": 4, "pipeline_split": "0,8,8,8"}, 4, ["fewest of a stage 0"]),
    ({"pipeline_model_parallel_size": 4, "pipeline_split": "half"}, 4, ["--pipeline-split = 'half'"]),
    ({"pipeline_split": "12,12"}, 1, ["--pipeline-split = 12,12", "has 1"]),
    ({"pipeline_model_parallel_size": 4, "pipeline_schedule": "interleaved"}, 4,
     ["--num-layers-per-virtual-pipeline-stage", "24 / 4"]),
    ({"pipeline_model_parallel_size": 4, **INTERLEAVED, "num_layers_per_virtual_pipeline_stage": 4}, 4,
     ["--num-layers = 24", "--num-layers-per-virtual-pipeline-stage = 4", "16 or 32"]),
    ({"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 3}, 4,
     ["--num-layers-per-virtual-pipeline-stage = 3", "1f1b", "--pipeline-schedule interleaved"]),
    ({"pipeline_model_parallel_size": 4, "pipeline_schedule": "zbv", "num_layers_per_virtual_pipeline_stage": 3}, 4,
     ["exactly two chunks"]),
    ({"pipeline_model_parallel_size": 4, "pipeline_schedule": "interleaved", "pipeline_split": "4,4,4,4,4,4"}, 4,
     ["6 stages", "give 4 or 8 numbers"]),
    # the batch
    ({"global_batch_size": 50}, 4, ["--global-batch-size = 50", "data-parallel size = 4", "48 or 56"]),
    ({"rampup_batch_size": (0, 8, 100)}, 1, ["--rampup-batch-size = 0 8 100", "at least 1"]),
    ({"rampup_batch_size": (64, 8, 100)}, 1, ["START", "--global-batch-size = 48"]),
    ({"rampup_batch_size": (8, 6, 100)}, 1, ["6 samples do not divide", "40"]),
    ({"rampup_batch_size": (6, 6, 100)}, 2, ["START and INCREMENT", "4 or 8"]),
    ({"rampup_batch_size": (2, 2, 100), "global_batch_size": 10**6}, 1, ["increments", "larger INCREMENT"]),
    ({"pipeline_model_parallel_size": 4, "global_batch_size": 6}, 4,
     ["3 microbatches", "1f1b", "8 samples (4 microbatches)"]),
    ({"pipeline_model_parallel_size": 4, **INTERLEAVED, "global_batch_size": 18}, 4, ["9 microbatches", "20 samples"]),
    ({"pipeline_model_parallel_size": 4, "rampup_batch_size": (4, 4, 100)}, 4,
     ["a step of the batch ramp = 4", "8 samples"]),
    # token dropping
    ({"random_ltd_start_length": 512}, 1, ["--random-ltd-start-length = 512", "--seq-length = 256"]),
    ({"random_ltd_start_length": 66, "random_ltd_strata": 4}, 1, ["--random-ltd-start-length = 66", "68"]),
    ({"random_ltd_strata": 3, "random_ltd_start_length": 66, "random_ltd_length_step": 3}, 1,
     ["--seq-length = 256", "258"]),
    ({"random_ltd_strata": 4, "random_ltd_length_step": 6}, 1, ["--random-ltd-length-step = 6", "8"]),
    ({"sequence_parallel": True, "tensor_model_parallel_size": 4, "random_ltd_strata": 2}, 4,
     ["--random-ltd-strata = 2", "--tensor-model-parallel-size = 4", "--random-ltd-strata 4"]),
    ({"random_ltd_layers": "1-24"}, 1, ["layer 24 does not exist", "up to 23"]),
    ({"random_ltd_layers": "1-5,3"}, 1, ["layer 3 is listed twice"]),
    ({"random_ltd_layers": "1..5"}, 1, ["--random-ltd-layers = '1..5'"]),
    ({"num_layers": 2}, 1, ["no layer drops tokens", "--random-ltd-layers"]),
    # the run
    ({"train_iters": None}, 1, ["needs one of --train-iters, --train-samples, --train-tokens"]),
    ({"train_iters": None, "train_samples": 40}, 1, ["--train-samples = 40", "one global batch"]),
    ({"train_iters": None, "train_tokens": 40 * 256}, 1, ["--train-tokens = 10240", "one global batch"]),
    ({"bf16": True, "fp16": True}, 1, ["--fp16", "--bf16"]),
    # the learning rate
    ({"min_lr": 0.1}, 1, ["--min-lr = 0.1", "--lr = 0.001"]),
    ({"lr_warmup_init": 0.1}, 1, ["--lr-warmup-init = 0.1"]),
    ({"lr_decay_iters": 50, "lr_warmup_iters": 60}, 1, ["--lr-warmup-iters = 60", "50 steps"]),
    ({"lr_decay_iters": 50, "lr_decay_tokens": 60}, 1,
     ["--lr-decay-iters = 50 and --lr-decay-tokens = 60", "keep one"]),
    ({"lr_warmup_samples": 50}, 1, ["--lr-warmup-iters = 10 and --lr-warmup-samples = 50"]),
    ({"lr_warmup_fraction": 0.1}, 1, ["--lr-warmup-fraction = 0.1", "--lr-warmup-iters = 10"]),
    ({"lr_decay_style": "WSD"}, 1, ["WSD", "--lr-wsd-decay-iters"]),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 101}, 1, ["--lr-wsd-decay-iters = 101", "100 steps"]),
    # data
    ({"data_path": None}, 1, ["no corpus is given", "--data-path"]),
    ({"mock_data": True}, 1, ["--mock-data and --data-path"]),
    ({"train_data_path": CORPUS}, 1, ["--data-path and --train-data-path"]),
    ({"data_path": None, "valid_data_path": CORPUS}, 1, ["--valid-data-path", "without --train-data-path"]),
    ({**SETS, "valid_data_path": ("wiki=a", "b")}, 1, ["--valid-data-path = wiki=a b", "b has no name"]),
    ({**SETS, "valid_data_path": ("a=x", "a=y")}, 1, ["--valid-data-path = a=x a=y", "two sets have one name"]),
    ({**SETS, "valid_data_path": ("1", "a", "2", "b"), "multiple_validation_sets": True}, 1,
     ["--multiple-validation-sets", "leave the weights out"]),
    ({**SETS, "multiple_validation_sets": True, "validation_set_names": ("x",)}, 1,
     ["--validation-set-names = x", "the 2 paths"]),
    ({**SETS, "multiple_validation_sets": True, "validation_set_names": ("x", "y/z")}, 1, ["= y/z", "letters"]),
    ({**SETS, "valid_data_path": ("1", "a", "2", "b"), "full_validation": True}, 1, ["--full-validation", "no end"]),
    ({"data_path": ("1", "a", "2", "b"), "full_validation": True}, 1, ["--full-validation", "--data-path = 1 a 2 b"]),
    ({"split": "1,2,3,4"}, 1, ["--split = 1,2,3,4"]),
    ({"split": "0,1,1"}, 1, ["--split = 0,1,1", "first above 0"]),
    ({"split": "90,-1"}, 1, ["--split = 90,-1"]),
    ({"split": "a,b"}, 1, ["--split = a,b"]),
    ({"split": "nan"}, 1, ["--split = nan"]),
    ({"tokenizer_type": None, "vocab_size": None}, 1, ["--tokenizer-type is required"]),
    ({"tokenizer_model": None}, 1, ["HuggingFaceTokenizer", "--tokenizer-model"]),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"}, 1, ["GPT2BPETokenizer", "--merge-file"]),
    ({"tokenizer_type": "NullTokenizer", "vocab_size": None}, 1, ["NullTokenizer", "--vocab-size"]),
    # checkpoints and logging
    ({"ckpt_step": 5}, 1, ["--ckpt-step = 5", "--load"]),
    ({"finetune": True}, 1, ["--finetune", "--load"]),
    ({"use_checkpoint_args": True}, 1, ["--use-checkpoint-args", "--load"]),
    ({"save": "x", "save_interval": 10, "save_retain_interval": 25}, 1, ["--save-retain-interval = 25", "= 10"]),
    ({"save": "x", "upload": "./x"}, 1, ["--upload = ./x", "is --save itself"]),
    ({"save": "x", "upload": "y", "upload_retain": 0}, 1, ["--upload-retain = 0"]),
]


@pytest.mark.parametrize(("changes", "processes", "fragments"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_what_cannot_run_is_refused(changes: dict[str, Any], processes: int, fragments: list[str]) -> None:
    found = violations(with_settings(**changes), processes)
    matching = [message for message in found if all(fragment in message for fragment in fragments)]
    assert len(matching) == 1, found


def test_a_value_of_any_length_leaves_room_for_what_is_wrong_with_it() -> None:
    with pytest.raises(ConfigError) as refusal:
        check(with_settings(pipeline_split="1," * 10_000 + "1", split="x"), 1)
    assert len(str(refusal.value)) < 4000
    assert "--pipeline-split = 1,1" in str(refusal.value) and "give 1 numbers" in str(refusal.value)


ACCEPTED: list[tuple[dict[str, Any], int]] = [
    ({}, 1), ({}, 4), ({}, 24),
    ({"tensor_model_parallel_size": 4}, 8),
    ({"tensor_model_parallel_size": 4, "sequence_parallel": True, "random_ltd_strata": 4}, 4),
    ({"sequence_parallel": True}, 1),
    ({"pipeline_model_parallel_size": 3}, 6),
    ({"pipeline_model_parallel_size": 5, "global_batch_size": 10}, 5),  # layers need not divide evenly
    ({"pipeline_model_parallel_size": 4, "pipeline_split": "5,7,7,5"}, 4),
    ({"pipeline_model_parallel_size": 4, **INTERLEAVED}, 4),
    ({"pipeline_model_parallel_size": 4, **INTERLEAVED, "global_batch_size": 6}, 4),  # fewer microbatches than stages
    ({"pipeline_model_parallel_size": 4, **INTERLEAVED, "pipeline_split": "2,4,3,3,3,3,4,2"}, 4),
    ({"pipeline_model_parallel_size": 4, "pipeline_schedule": "interleaved", "pipeline_split": "2,4,3,3,3,3,4,2"}, 4),
    ({"pipeline_model_parallel_size": 4, **INTERLEAVED, "pipeline_schedule": "interleaved-zero-bubble"}, 4),
    ({"pipeline_model_parallel_size": 4, "pipeline_schedule": "zbv", "global_batch_size": 2}, 4),
    ({"pipeline_model_parallel_size": 4, "pipeline_schedule": "zbv",
      "data_parallel_sharding_strategy": "optim_grads_params"}, 8),
    ({**INTERLEAVED}, 2),  # without a pipeline its schedule means nothing
    ({"rampup_batch_size": (8, 8, 500)}, 4),
    ({"random_ltd_start_length": 256}, 1),
    ({"random_ltd_layers": "0-23"}, 1),
    ({"random_ltd": False, "random_ltd_start_length": 100_000, "num_layers": 1}, 1),
    ({"random_ltd_steps": None, "random_ltd_strata": 4, "random_ltd_length_step": 3}, 1),
    ({"train_iters": None, "train_samples": 4800, "lr_warmup_iters": 0, "lr_warmup_samples": 48}, 1),
    ({"train_iters": None, "train_tokens": 10**6, "lr_warmup_iters": 0, "lr_warmup_fraction": 0.5}, 1),
    ({"lr_decay_style": "constant", "lr_warmup_iters": 1000}, 1),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20}, 1),
    ({"data_path": None, "mock_data": True, "tokenizer_type": None}, 1),
    ({"data_path": None, "train_data_path": CORPUS, "valid_data_path": CORPUS}, 1),
    ({**SETS, "multiple_validation_sets": True, "full_validation": True}, 1),
    ({**SETS, "valid_data_path": ("wiki=a", "books=/data/lang=en/b"), "eval_iters": 0}, 1),
    ({"split": "1"}, 1), ({"split": "100,0,0"}, 1),
    ({"vocab_size": None}, 2),
    ({"position_embedding_type": "rope", "rotary_percent": 0.25}, 1),
    ({"kv_channels": 16, "hidden_size": 100}, 1),
    ({"finetune": True, "load": "x", "ckpt_step": 0}, 1),
    ({"save": "x", "save_interval": 10, "save_retain_interval": 50}, 1),
    ({"fp16": True, "loss_scale": 128.0}, 1),
    ({"eval_iters": 0}, 1),
]


@pytest.mark.parametrize(("changes", "processes"), ACCEPTED, ids=[str(changes) for changes, _ in ACCEPTED])
def test_what_can_run_is_accepted(changes: dict[str, Any], processes: int) -> None:
    assert violations(with_settings(**changes), processes) == []
    check(with_settings(**changes), processes)


def test_everything_that_is_wrong_is_reported_at_once() -> None:
    config = with_settings(tensor_model_parallel_size=8, random_ltd_start_length=500, min_lr=1.0, train_epochs=3,
                           bf16=True, fp16=True, split="x", ckpt_step=2, max_position_embeddings=10)
    with pytest.raises(ConfigError) as error:
        check(config, 8)
    message = str(error.value)
    assert message.startswith("8 problems in the settings:\n  - ")
    for flag in ("--num-attention-heads = 12", "--random-ltd-start-length = 500", "--min-lr = 1.0",
                 "--train-epochs = 3", "--fp16", "--split = x", "--ckpt-step = 2", "--max-position-embeddings = 10"):
        assert message.count(flag) == 1, flag
    assert error.value.exit_code == 20


def test_what_is_missing_does_not_hide_what_is_wrong() -> None:
    """The messages about a setting that is missing say that alone: nothing is said about a value nobody gave."""
    wrong = {"num_attention_heads": 6, "tensor_model_parallel_size": 4, "random_ltd_layers": "1,1", "min_lr": 5.0,
             "global_batch_size": 7}
    for missing in ({"lr": None}, {"hidden_size": 0}, {"num_layers": 0}, {"seq_length": 0}, {"micro_batch_size": -1},
                    {"lr": None, "num_layers": 0, "hidden_size": 0, "seq_length": 0}):
        found = violations(with_settings(**wrong, **missing), 8)
        said = "\n".join(found)
        assert "--num-attention-heads = 6: not divisible by --tensor-model-parallel-size = 4" in said, missing
        assert "layer 1 is listed twice" in said
        assert ("--min-lr = 5.0" in said) == ("lr" not in missing)
        assert ("--global-batch-size = 7" in said) == ("micro_batch_size" not in missing)
        for field in missing:
            assert sum(f"--{field.replace('_', '-')} " in text for text in found) == 1, (missing, said)
        assert "5040" not in said and "322560" not in said


def test_the_defaults_name_everything_that_a_user_has_to_give() -> None:
    found = violations(RunConfig(), 1)
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--lr", "--train-iters",
                 "--data-path", "--tokenizer-type"):
        assert any(flag in message for message in found), flag
    assert len(found) == 8


def test_every_number_has_a_range_and_every_range_a_setting() -> None:
    numbers = {flag.field for flag in all_flags() if flag.kind in (int, float) and flag.count == 1}
    assert set(RANGES) == numbers


def small_values(flag: Flag) -> st.SearchStrategy[Any]:
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(), int: st.integers(-2, 40), float: st.floats(-1, 2),
        str: st.sampled_from(flag.choices or ("", "a", "1,2", "1-3", "uniform", "0,0", "auto", "0:4,2:8"))}
    one = kinds[flag.kind]
    value = st.tuples(*[one] * (flag.count or 1)) if flag.count not in (0, 1) else one
    return value if flag.default is not None else st.none() | value


@st.composite
def any_configuration(draw: st.DrawFn) -> RunConfig:
    """The runnable settings with some set to anything of their type."""
    flags = draw(st.lists(st.sampled_from(all_flags()), max_size=10))
    return with_settings(**{flag.field: draw(small_values(flag)) for flag in flags})


@settings(max_examples=400)
@given(any_configuration(), st.integers(1, 12))
def test_any_settings_are_accepted_or_refused_with_a_remedy_and_never_raise(config: RunConfig, processes: int) -> None:
    for message in violations(config, processes):
        assert message.count("\n") == 0
        assert "--" in message
        assert ";" in message or "required: give" in message, message
    assert all("no effect" in note for note in idle_settings(config))


def test_the_runnable_settings_have_no_idle_ones() -> None:
    assert idle_settings(RUNNABLE) == []


@pytest.mark.parametrize(("changes", "flag"), [
    ({"sequence_parallel": True}, "--sequence-parallel"),
    ({"pipeline_schedule": "zbv"}, "--pipeline-schedule"),
    ({"num_layers_per_virtual_pipeline_stage": 2}, "--num-layers-per-virtual-pipeline-stage"),
    ({"recompute_activations": True, "recompute_granularity": "full"}, "--recompute-activations"),
    ({"random_ltd": False, "random_ltd_steps": None}, "--random-ltd-start-length"),
    ({"random_ltd_steps": None, "random_ltd_length_step": 8}, "--random-ltd-length-step"),
    ({"token_drop_beta": 0.5}, "--token-drop-beta"),
    ({"token_drop_no_cross_layer": True}, "--token-drop-no-cross-layer"),
    ({"group_query_attention": True}, "--group-query-attention"),
    ({"rotary_base": 500}, "--rotary-base"),
    ({"rotary_percent": 0.5}, "--rotary-percent"),
    ({"add_qkv_bias": True}, "--add-qkv-bias"),
    ({"mask_prob": 0.3}, "--mask-prob"),
    ({"mask_whole_word": False}, "--mask-whole-word"),
    ({"family": "bert", "mask_geometric": True, "mask_longer_ngrams": True}, "--mask-longer-ngrams"),
    ({"loss_scale": 8.0}, "--loss-scale"),
    ({"lr_wsd_decay_iters": 8}, "--lr-wsd-decay-iters"),
    ({"optimizer": "sgd", "adam_eps": 1.0}, "--adam-eps"),
    ({"muon_momentum": 0.9}, "--muon-momentum"),
    ({"optimizer": "sgd", "muon_split_qkv": False}, "--muon-split-qkv"),
    ({"validation_set_names": ("a",)}, "--validation-set-names"),
    ({"multiple_validation_sets": True}, "--multiple-validation-sets"),
    ({"full_validation": True, "data_path": None, "mock_data": True}, "--full-validation"),
    ({"full_validation": True, "eval_iters": 3}, "--eval-iters"),
    ({"async_save": True}, "--async-save"),
    ({"no_load_optim": True}, "--no-load-optim"),
    ({"prompt_key": "question"}, "--prompt-key"),
    ({"train_jsonl": ("a.jsonl",), "eod_mask_loss": True}, "--eod-mask-loss"),
])
def test_a_setting_without_effect_is_named(changes: dict[str, Any], flag: str) -> None:
    notes = idle_settings(with_settings(**changes))
    assert len(notes) == 1 and notes[0].startswith(f"{flag} has no effect")


def test_it_is_told_that_a_test_set_is_not_read_where_only_validation_is_on() -> None:
    paths = {"data_path": None, "train_data_path": ("a",), "valid_data_path": ("b",), "test_data_path": ("c",)}
    assert not idle_settings(with_settings(**paths, full_validation=True))
    assert any("--test-data-path has no effect with --eval-iters = 0" in note
               for note in idle_settings(with_settings(**paths, full_validation=True, eval_iters=0)))


def test_in_finetuning_the_kept_length_grows_without_being_told_for_how_long() -> None:
    config = with_settings(random_ltd_steps=None, random_ltd_length_step=8)
    assert idle_settings(config, finetuning=True) == []
    assert len(idle_settings(with_settings(config, random_ltd=False), finetuning=True)) == 2


def test_epochs_are_a_budget_whose_length_is_known_once_their_samples_are_counted() -> None:
    config = with_settings(train_iters=None, train_epochs=3, lr_warmup_iters=40)
    assert violations(config, 1) == []
    assert violations(with_settings(config, epoch_samples=800), 1) == []
    assert violations(with_settings(config, epoch_samples=100), 1) == []  # 7 steps: the warm-up does not end
    (note,) = notes(with_settings(config, epoch_samples=100), 1)
    assert "the run of 7 steps is not longer than the warm-up of 40" in note
    (problem,) = violations(with_settings(config, train_iters=5), 1)
    assert "--train-iters = 5 and --train-epochs = 3 are given" in problem and "epochs stand alone" in problem
