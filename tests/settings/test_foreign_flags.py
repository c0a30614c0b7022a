"""What a Megatron user's script is told about flags that this project does not have."""

import re
from pathlib import Path

import pytest

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.settings.cli import FILE_FLAGS, parse_run_config
from megatron_ltd.settings.flag_reference import all_flags
from megatron_ltd.settings.foreign_flags import (
    ANSWERS,
    MEGATRON_LIST,
    NO_EFFECT,
    RENAMED,
    SATISFIED,
    TRANSLATED,
    UNSUPPORTED,
    VALUES,
    foreign_answer,
)
from tools.upkeep import megatron_flags

OURS = {flag.name for flag in all_flags()}
OTHERS = {"--" + name for name in ANSWERS["other"].split()}
FAMILIES = tuple(name.removesuffix("*") for name in UNSUPPORTED if name.endswith("*"))
"""Beginnings of flags that get one answer."""

# The flags that hundreds of public Megatron-LM and Megatron-DeepSpeed scripts pass most often.
COMMON_FLAGS = """
num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels group-query-attention num-query-groups seq-length
max-position-embeddings position-embedding-type rotary-base rotary-percent use-rotary-position-embeddings normalization
norm-epsilon swiglu squared-relu disable-bias-linear add-qkv-bias untie-embeddings-and-output-weights
make-vocab-size-divisible-by hidden-dropout attention-dropout init-method-std apply-layernorm-1p
attention-softmax-in-fp32 attention-backend use-flash-attn transformer-impl bert-no-binary-head openai-gelu
micro-batch-size global-batch-size
rampup-batch-size step-batch-size-schedule train-iters train-samples exit-interval exit-duration-in-mins
exit-signal-handler seed optimizer lr min-lr lr-decay-style lr-wsd-decay-style lr-wsd-decay-iters lr-decay-iters
lr-decay-samples lr-warmup-iters lr-warmup-samples lr-warmup-fraction lr-warmup-init override-opt_param-scheduler
use-checkpoint-opt_param-scheduler weight-decay start-weight-decay end-weight-decay clip-grad adam-beta1 adam-beta2
adam-eps dataloader-type num-workers calculate-per-token-loss manual-gc fp16 bf16 loss-scale initial-loss-scale
min-loss-scale loss-scale-window hysteresis accumulate-allreduce-grads-in-fp32 fp16-lm-cross-entropy grad-reduce-in-bf16
fp8-format tensor-model-parallel-size pipeline-model-parallel-size num-layers-per-virtual-pipeline-stage
num-virtual-stages-per-pipeline-rank decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
context-parallel-size expert-model-parallel-size sequence-parallel use-distributed-optimizer overlap-grad-reduce
overlap-param-gather distributed-backend distributed-timeout-minutes recompute-activations recompute-granularity
recompute-method recompute-num-layers deterministic-mode data-path split train-data-path valid-data-path test-data-path
data-cache-path mock-data tokenizer-type tokenizer-model vocab-file merge-file vocab-size reset-position-ids
reset-attention-mask eod-mask-loss no-create-attention-mask-in-dataloader mask-prob short-seq-prob log-interval
eval-interval eval-iters tensorboard-dir tensorboard-log-interval tensorboard-queue-size log-timers-to-tensorboard
log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-params-norm log-num-zeros-in-grad log-throughput
timing-log-level wandb-project wandb-exp-name profile save load save-interval no-save-optim no-save-rng no-load-optim
no-load-rng finetune use-checkpoint-args pretrained-checkpoint ckpt-format ckpt-step async-save
exit-on-missing-checkpoint auto-detect-ckpt-format dist-ckpt-strictness random-ltd train-tokens lr-decay-tokens
lr-warmup-tokens no-pipeline-parallel zero-stage deepspeed deepspeed_config use-mcore-models num-experts
""".split()


@pytest.mark.parametrize("name", COMMON_FLAGS)
def test_every_common_flag_is_ours_or_has_an_answer_of_its_own(name: str) -> None:
    flags = OURS | set(FILE_FLAGS) | set(RENAMED) | {words.split()[0] for words in TRANSLATED}
    answer = foreign_answer("--" + name, ())
    assert "--" + name in flags or (answer is not None and "Megatron has this flag" not in answer.text)


def test_every_foreign_flag_is_answered_as_such_and_never_as_a_slip_of_the_pen() -> None:
    for name in [*(name.replace("*", "anything") for name in UNSUPPORTED), *OTHERS]:
        if f"{name} 7" in TRANSLATED or name in RENAMED:
            continue
        with pytest.raises(ConfigError) as error:
            parse_run_config([name, "7"])
        assert str(error.value).startswith(f"{name} 7: not supported: "), name


def test_every_flag_without_effect_is_accepted_and_named_once_with_the_reason() -> None:
    for pattern, reason in NO_EFFECT.items():
        name = pattern.replace("*", "anything")
        config, notes = parse_run_config([name, name, "--seed", "3"])
        assert notes == [f"{name} has no effect here: {reason}"]
        assert config.training.seed == 3


@pytest.mark.parametrize("words", SATISFIED)
def test_a_value_that_asks_for_what_happens_anyway_is_accepted_and_others_are_not(words: str) -> None:
    name, value = words.split()
    config, notes = parse_run_config([name, value])
    assert config == RunConfig() and len(notes) == 1 and words in notes[0]
    with pytest.raises(ConfigError, match="not supported"):
        parse_run_config([name, "another"])


@pytest.mark.parametrize("words", VALUES)
def test_a_value_that_a_flag_has_elsewhere_is_answered_with_what_to_use(words: str) -> None:
    name, value = words.split()
    with pytest.raises(ConfigError) as error:
        parse_run_config([name, value])
    assert str(error.value) == f"{name} = {value}: {VALUES[words]}"


RENEWED = """
multiple-validation-sets full-validation exit-signal softmax-type mtp-num-layers qk-clip moe-router-fusion
use-megatron-fsdp fault-injector-ranks logprobs-mode grad-norm-skip-threshold tokenizer-metadata wd-incr-steps
""".split()


def test_the_list_of_megatrons_flags_is_made_of_its_sources() -> None:
    pytest.importorskip("megatron.core")
    folders, origin = megatron_flags.installed()
    header, *listed = MEGATRON_LIST.read_text().splitlines()
    assert f"from {origin}" in header and listed == sorted(set(listed))
    core = Path(folders[0]) / "core"
    sources = (core / name for name in ("model_parallel_config.py", "transformer/transformer_config.py"))
    found = {name for path in sources for name in megatron_flags.flag_names(path.read_text())}
    assert found <= set(listed) and len(found) > 200
    assert [name for name in RENEWED if name not in listed] == []


@pytest.mark.parametrize("name", RENEWED)
def test_a_flag_of_megatron_is_never_taken_for_another(name: str) -> None:
    try:
        _, notes = parse_run_config([f"--{name}"])
    except ConfigError as error:
        notes = [str(error)]
    assert all("no such flag" not in note and "nearest" not in note for note in notes)


def test_names_in_sources_are_found_wherever_they_stand() -> None:
    source = """
@dataclass
class RunConfig(Base):
    learning_rate: float = 1.0
    fuse: bool = True
    hook: Callable | None = None
    _hidden: int = 0
parser.add_argument("--from_here", "-f", "--or-here", help="see --and-there, not --log-* or --x")
"""
    assert set(megatron_flags.flag_names(source)) == {
        "learning-rate", "fuse", "no-fuse", "from-here", "or-here", "and-there"}


@pytest.mark.parametrize(("foreign", "ours"), [
    ("--model_name_or_path gpt2", "--pretrained-checkpoint"), ("--output_dir out", "--save DIR"),
    ("--gradient_accumulation_steps 4", "--global-batch-size"), ("--dataset_name wikitext", "--train-jsonl"),
    ("--lora_dim 8", "no adapters"), ("--resume_from_checkpoint x", "--load DIR"), ("--torch_dtype auto", "--bf16"),
    ("--lr_scheduler_type polynomial", "--lr-decay-style"),
])
def test_names_of_transformers_and_deepspeeds_examples_are_answered_with_ours(foreign: str, ours: str) -> None:
    with pytest.raises(ConfigError, match="not supported: ") as error:
        parse_run_config(foreign.split(), finetuning=True)
    assert ours in str(error.value)


def test_a_command_of_transformers_is_understood_where_the_meaning_is_the_same() -> None:
    theirs = ("--per_device_train_batch_size 4 --learning_rate 1e-4 --num_train_epochs 3 --lr_scheduler_type cosine "
              "--warmup_ratio 0.25 --bf16 True --fp16 False --gradient_checkpointing True --logging_steps 5 "
              "--max_grad_norm 0.5 --train_file a.jsonl --max_seq_length 64 --do_train --report_to none "
              "--overwrite_output_dir")
    ours = ("--micro-batch-size 4 --lr 1e-4 --train-epochs 3 --lr-decay-style cosine --lr-warmup-fraction 0.25 --bf16 "
            "--recompute-granularity full --log-interval 5 --clip-grad 0.5 --train-jsonl a.jsonl --seq-length 64")
    assert parse_run_config(theirs.split(), finetuning=True)[0] == parse_run_config(ours.split(), finetuning=True)[0]


def test_no_flag_has_two_answers() -> None:
    tables = [OURS, set(NO_EFFECT), set(UNSUPPORTED), OTHERS, set(RENAMED)]
    assert len(set().union(*tables)) == sum(len(table) for table in tables)
    assert {words.split()[0] for words in SATISFIED} <= set(UNSUPPORTED)
    assert not [name for name in OURS | set(NO_EFFECT) | OTHERS if name.startswith(FAMILIES)]


def test_advice_names_only_flags_that_exist() -> None:
    texts = [*UNSUPPORTED.values(), *NO_EFFECT.values(), *VALUES.values()]
    named = {flag for text in texts for flag in re.findall(r"--[a-z][a-z0-9_-]+", text)}
    assert named <= OURS | set(FILE_FLAGS)


@pytest.mark.parametrize(("foreign", "ours"), TRANSLATED.items())
def test_a_flag_that_means_what_another_means_here_is_taken_as_that_and_said_so(
        foreign: str, ours: str) -> None:
    config, notes = parse_run_config(foreign.split())
    expected, idle = parse_run_config(ours.split())
    assert config == expected
    assert notes == [f"{foreign}: taken as {ours or 'not given'}", *idle]


@pytest.mark.parametrize(("foreign", "ours"), RENAMED.items())
def test_a_flag_of_another_name_keeps_its_value(foreign: str, ours: str) -> None:
    value = {"--lr-warmup-fraction": "0.25", "--norm-epsilon": "0.25", "--tokenizer-model": "x",
             "--recompute-granularity": "full", "--lr": "0.25", "--adam-eps": "0.25",
             "--clip-grad": "0.25", "--tensorboard-dir": "x"}.get(ours, "4")
    assert parse_run_config([foreign, value])[0] == parse_run_config([*ours.split(), value])[0] != RunConfig()


def test_other_ways_to_write_a_flag_and_its_value_are_understood() -> None:
    plain, _ = parse_run_config(["--micro-batch-size", "4", "--split", "99,1,0"])
    assert parse_run_config(["--micro_batch_size", "4", "--split", "'99,1,0'"])[0] == plain
    assert parse_run_config(["--micro-batch-size", "4", "--split", '"99,1,0"', "--use_flash_attn"])[0] == plain
    assert parse_run_config(["--train-iters", "5", "--no-train-iters"])[0] == RunConfig()
    assert parse_run_config(["--train-iters", "5", "--train-iters", "none"])[0] == RunConfig()


def test_the_tokenizer_is_megatrons_where_its_files_are_given() -> None:
    files = ["--vocab-file", "v", "--merge-file", "m"]
    assert parse_run_config(files)[0].data.tokenizer_type == "GPT2BPETokenizer"
    assert parse_run_config(files[:2], "bert")[0].data.tokenizer_type == "BertWordPieceLowerCase"
    assert parse_run_config(files[:2])[0].data.tokenizer_type is None
    assert parse_run_config([*files, "--use-checkpoint-args"])[0].data.tokenizer_type is None


def test_a_flag_nobody_has_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="--sequence-paralel: no such flag; nearest: --sequence-parallel"):
        parse_run_config(["--sequence-paralel"])


@pytest.mark.parametrize(("name", "meant"), [
    ("--log-intervall", "--log-interval"), ("--log-intervals", "--log-interval"),
    ("--tensorbord-dir", "--tensorboard-dir"), ("--tensorboard-dirs", "--tensorboard-dir"),
    ("--wandb-projct", "--wandb-project")])
def test_a_slip_of_the_pen_is_told_even_where_a_pattern_of_flags_has_an_answer(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: no such flag; nearest: {meant}"):
        parse_run_config([name, "5"])


def test_a_name_that_is_like_no_flag_has_no_nearest() -> None:
    with pytest.raises(ConfigError, match="--quantum-entangler: no such flag; leave it out, or see --help-all"):
        parse_run_config(["--quantum-entangler"])


def test_whole_numbers_may_be_written_in_groups_as_python_reads_them() -> None:
    config, _ = parse_run_config(["--train-samples", "73_242_187", "--rampup-batch-size", "32", "32", "2_000_000"])
    assert (config.training.train_samples, config.training.rampup_batch_size) == (73242187, (32, 32, 2000000))
    for wrong in ("_1", "1_", "1__0", "1_e3"):
        with pytest.raises(ConfigError, match="not a whole number"):
            parse_run_config(["--train-samples", wrong])


@pytest.mark.parametrize(("words", "expected"), [
    (["--no-position-embedding"], "none"),
    (["--no-position-embedding", "--use-rotary-position-embeddings"], "rope"),
    (["--use-rotary-position-embeddings", "--no_position_embedding"], "rope"),
])
def test_no_position_embedding_takes_learned_positions_away_and_leaves_rotary_ones(
        words: list[str], expected: str) -> None:
    assert parse_run_config(words)[0].model.position_embedding_type == expected


def test_settings_of_experts_stop_a_run_only_where_there_are_experts() -> None:
    settings = ["--moe-loss-coeff", "0.01", "--moe-train-capacity-factor", "1.0", "--create-moe-param-group"]
    config, notes = parse_run_config([*settings, "--num-experts", "1"])
    assert config == RunConfig() and len(notes) == 4
    with pytest.raises(ConfigError, match="^--num-experts 8: not supported: there are no mixture-of-experts layers"):
        parse_run_config([*settings, "--num-experts", "8"])


@pytest.mark.parametrize("words", ["--codecarbon-dir x", "--trigger-path x", "--kill-switch-path x",
                                   "--structured-logs", "--valid-num-workers 2", "--world_size 8",
                                   "--my-fork-log-interval 5",
                                   "--clearml-project x", "--use-lazy-mode false", "--cache-fp8-weight-fwd true"])
def test_a_forks_flags_for_logging_data_and_launching_are_noted(words: str) -> None:
    config, notes = parse_run_config(words.split())
    assert config == RunConfig() and len(notes) == 1 and " has no effect here: " in notes[0]


WEIGHTED = [  # the words after the flag, and the corpora that they mean
    (["TRAIN: 0.3 0:0.6 en, 1 0:0.6 fr"], ("0.3", "en@0:0.6", "1.0", "fr@0:0.6")),
    (['"TRAIN:', "1", "0:0.6", 'en"'], ("1.0", "en@0:0.6")),
    (["A: 1 0.6:0.8 en, 3 0.6:0.8 fr", "B: 5 0.6:0.8 de"],
     ("0.25", "en@0.6:0.8", "0.75", "fr@0.6:0.8", "1.0", "de@0.6:0.8")),
]


@pytest.mark.parametrize(("words", "expected"), WEIGHTED)
def test_weighted_splits_are_parts_of_corpora(words: list[str], expected: tuple[str, ...], tmp_path: Path) -> None:
    config, notes = parse_run_config(["--valid-weighted-split-paths", *words])
    assert config.data.valid_data_path == expected and "taken as --valid-data-path" in notes[0]
    file = tmp_path / "splits"
    file.write_text(" ".join(words) if '"' in words[0] else " ".join(f'"{word}"' for word in words) + "\n")
    assert parse_run_config(["--valid_weighted_split_paths_path", str(file)])[0] == config


@pytest.mark.parametrize("words", [["--train-weighted-split-paths", "TRAIN: 0.3 en"],
                                   ["--train-weighted-split-paths", "TRAIN: en fr de"],
                                   ["--train-weighted-split-paths-path", "/nowhere"]])
def test_weighted_splits_of_another_form_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"^{words[0]} = .*; (write|give)"):
        parse_run_config(words)
