"""Everything that is wrong with the settings of a run, at once, before any process group exists.

    violations = values, then what they mean together: layout, model, token dropping, run length, learning rate, data,
                 checkpoints

A message names the setting and its value, the constraint, and the remedy. Plain arithmetic: no torch, no files. With
`--use-checkpoint-args` the model's settings must have been taken from the checkpoint before; a vocabulary that only
the tokenizer knows is checked once it is set.
"""

from collections.abc import Iterable, Iterator

from megatron_ltd.config import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import (
    data_parallel_size,
    has_curriculum,
    length_is_given,
    total_steps,
)
from megatron_ltd.settings.checks.family import family_violations
from megatron_ltd.settings.checks.layout import layout_violations
from megatron_ltd.settings.checks.learning_rate import learning_rate_violations
from megatron_ltd.settings.checks.token_drop import token_drop_violations
from megatron_ltd.settings.checks.values import flag_name, repaired, value_violations
from megatron_ltd.settings.checks.vision import image_sources, vision_violations


def check(config: RunConfig, world_size: int) -> None:
    """Refuse settings that cannot run.

    Args:
        world_size: processes of the launch.

    Raises:
        ConfigError: with every violation.
    """
    refuse(violations(config, world_size))


def refuse(problems: Iterable[str]) -> None:
    """Raises:
        ConfigError: with every problem, if there is one.
    """
    if found := list(problems):
        raise config_error(found)


def config_error(problems: list[str]) -> ConfigError:
    """One error that lists every problem."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError(f"{len(problems)} problems in the settings:\n" + "\n".join(f"  - {text}" for text in problems))


def violations(config: RunConfig, world_size: int) -> list[str]:
    """One message for each thing that is wrong; empty for settings that can run."""
    values = dict(value_violations(config))
    budget = _budget(config)
    # The arithmetic needs sizes that are positive. What it finds with a stand-in for one of them is not said.
    together = _together(repaired(config, values), world_size, bool(budget))
    stand_ins = tuple(f"{flag_name(field)} " for _, field in values)
    return [*values.values(), *budget, *_precision(config), *_data(config), *_checkpoint(config),
            *(text for text in together if not any(flag in text for flag in stand_ins))]


def _together(config: RunConfig, world_size: int, no_budget: bool) -> list[str]:
    """What is wrong with settings that are right one by one."""
    layout = list(layout_violations(config, world_size))
    dropping = list(token_drop_violations(config))
    problems = [*_model(config), *dropping, *family_violations(config), *vision_violations(config), *layout]
    in_tokens = config.training.token_budget == "layer" or config.optimizer.layer_token_lr or has_curriculum(config)
    countable = not (layout or no_budget or _budget(config) or (dropping and in_tokens)) and length_is_given(config)
    too_short = list(_length(config, world_size)) if countable else []
    length_known = countable and not too_short
    return problems + too_short + learning_rate_violations(config, world_size if length_known else None)


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    heads = model.num_attention_heads
    if model.kv_channels is None and model.hidden_size % heads:
        yield (f"--hidden-size = {model.hidden_size}: not divisible by --num-attention-heads = {heads}; choose "
               f"{(model.hidden_size // heads + 1) * heads}, or set the size of a head with --kv-channels")
    elif model.position_embedding_type == "rope" and model.head_dim % 2:
        yield (f"--position-embedding-type = rope: heads of {model.head_dim} channels, but rotation takes pairs; "
               "choose an even --kv-channels, or sizes with an even --hidden-size / --num-attention-heads")
    elif model.position_embedding_type == "rope" and int(model.head_dim * model.rotary_percent) < 2:
        yield (f"--rotary-percent = {model.rotary_percent}: less than two of {model.head_dim} channels of a head; "
               f"choose at least {2 / model.head_dim}")
    if model.num_query_groups is not None and not model.group_query_attention:
        yield (f"--num-query-groups = {model.num_query_groups}: only used with --group-query-attention; add that, or "
               "leave it out")
    elif heads % model.query_groups:
        yield (f"--num-query-groups = {model.query_groups}: does not divide --num-attention-heads = {heads}; "
               "choose a divisor")
    if model.ffn < 1:
        yield (f"--hidden-size = {model.hidden_size}: too small for the default width of a SwiGLU MLP; "
               "give --ffn-hidden-size")
    if model.swiglu and model.openai_gelu:
        yield "--openai-gelu is given with --swiglu = on: the MLP has one activation; leave one of them out"
    if model.seq_length > model.max_positions:
        yield (f"--seq-length = {model.seq_length}: more than --max-position-embeddings = {model.max_positions}; "
               "raise that, or leave it out")


def _budget(config: RunConfig) -> list[str]:
    training = config.training
    budgets = {"--train-iters": training.train_iters, "--train-samples": training.train_samples,
               "--train-tokens": training.train_tokens, "--train-epochs": training.train_epochs}
    given = [f"{flag} = {value}" for flag, value in budgets.items() if value is not None]
    if len(given) == 1:
        return []
    found = " and ".join(given) + " are given" if given else "no training budget is given"
    return [f"{found}: the length of the run needs exactly one of {', '.join(budgets)}; "
            f"{'keep one' if given else 'add one'}"]


def _length(config: RunConfig, world_size: int) -> Iterator[str]:
    """Whether the budget is enough for one step."""
    if total_steps(config, data_parallel_size(config, world_size)) < 1:
        training = config.training
        given = f"--train-samples = {training.train_samples}"
        if training.train_tokens is not None:
            given = f"--train-tokens = {training.train_tokens}"
        yield f"{given}: less than one global batch; give more, or lower --global-batch-size"


def _precision(config: RunConfig) -> Iterator[str]:
    training = config.training
    if training.bf16 and training.fp16:
        yield "--fp16 is given with --bf16 = on: a run computes in one precision; leave one of them out"
    if training.fp16 and training.min_loss_scale > training.initial_loss_scale:
        yield (f"--min-loss-scale = {training.min_loss_scale:g}: more than --initial-loss-scale = "
               f"{training.initial_loss_scale:g}; choose at most that")


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if config.model.family == "vit":
        yield from image_sources(config)
        return
    split = {"--train-data-path": data.train_data_path, "--valid-data-path": data.valid_data_path,
             "--test-data-path": data.test_data_path}
    separate = [flag for flag, value in split.items() if value is not None]
    sources = (["--mock-data"] if data.mock_data else []) + (["--data-path"] if data.data_path is not None else [])
    lines = [flag for flag, value in (("--train-jsonl", data.train_jsonl), ("--valid-jsonl", data.valid_jsonl),
                                      ("--test-jsonl", data.test_jsonl)) if value is not None]
    if lines:
        yield from _lines_alone(lines, sources + separate)
    elif len(sources) + bool(separate) > 1:
        yield (f"{' and '.join(sources + separate)} are given: the corpus must come from one of --data-path, separate "
               "paths for each split, or --mock-data; keep one")
    elif not sources and not separate:
        yield "no corpus is given; add --data-path PREFIX, or --mock-data for a throughput run"
    elif separate and data.train_data_path is None:
        yield f"{separate[0]} is given without --train-data-path: nothing to train on; add it"
    yield from _split(data.split)
    yield from _tokenizer(config)


def _lines_alone(lines: list[str], others: list[str]) -> Iterator[str]:
    if others:
        yield (f"{lines[0]} and {others[0]} are given: a run reads prompts and responses or a corpus; keep one")
    if "--train-jsonl" not in lines:
        yield f"{lines[0]} is given without --train-jsonl: nothing to train on; add it"


def _split(text: str) -> Iterator[str]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or shares[0] == 0:
        yield (f"--split = {text}: must be up to three numbers of at least 0 between commas, the shares of training, "
               "validation and test, the first above 0; write for example 969,30,1")


def _tokenizer(config: RunConfig) -> Iterator[str]:
    data, kind = config.data, config.data.tokenizer_type
    needed = {"GPT2BPETokenizer": ("vocab_file", "merge_file"), "SentencePieceTokenizer": ("tokenizer_model",),
              "HuggingFaceTokenizer": ("tokenizer_model",), "BertWordPieceLowerCase": ("vocab_file",),
              "BertWordPieceCase": ("vocab_file",)}
    if kind is None and not (data.mock_data and config.model.vocab_size is not None):
        yield ("--tokenizer-type is required, as the corpus was made with one; name it, or for a corpus of numbers "
               "use --tokenizer-type NullTokenizer --vocab-size N (--mock-data needs only --vocab-size)")
    for field in needed.get(kind or "", ()):
        if getattr(data, field) is None:
            yield f"--tokenizer-type = {kind}: needs --{field.replace('_', '-')}; add its path"
    if kind == "NullTokenizer" and config.model.vocab_size is None:
        yield "--tokenizer-type = NullTokenizer: needs --vocab-size; give the number of token ids"


def _checkpoint(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    needs_load = {"--finetune": checkpoint.finetune, "--use-checkpoint-args": checkpoint.use_checkpoint_args,
                  f"--ckpt-step = {checkpoint.ckpt_step}": checkpoint.ckpt_step is not None}
    if checkpoint.load is None:
        yield from (f"{text} is given without --load: there is no checkpoint to take; add --load DIR"
                    for text, given in needs_load.items() if given)
    interval, retain = checkpoint.save_interval, checkpoint.save_retain_interval
    if interval is not None and checkpoint.save is None:
        yield f"--save-interval = {interval} is given without --save: nothing would be saved; add --save DIR"
    if retain is not None and (interval is None or (interval > 0 and retain % interval)):
        yield (f"--save-retain-interval = {retain}: no checkpoint to keep unless it is a multiple of --save-interval = "
               f"{interval}; choose a multiple")
    if config.logging.profile and config.logging.metrics_file is None:
        yield "--profile is given without --metrics-file: the trace is written beside it; add --metrics-file PATH"
