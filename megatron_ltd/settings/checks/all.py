"""Everything that is wrong with the settings of a run, at once, before any process group exists.

    violations = values, then what they mean together: rules, layout, model, token dropping, run length, learning rate,
                 data

A message names the setting and its value, the constraint, and the remedy. Plain arithmetic: no torch, no files. With
`--use-checkpoint-args` the model's settings must have been taken from the checkpoint before; a vocabulary that only
the tokenizer knows is checked once it is set.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_ltd.checkpoint.durable import is_url
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError, flag_name
from megatron_ltd.plan.derived import data_parallel_size, length_is_given, reads_vary, total_steps
from megatron_ltd.settings.checks.attention import attention_violations
from megatron_ltd.settings.checks.bad_steps import bad_step_violations
from megatron_ltd.settings.checks.layout import layout_violations
from megatron_ltd.settings.checks.learning_rate import learning_rate_notes, learning_rate_violations
from megatron_ltd.settings.checks.rules import exceeded_limits, excluded_settings, given
from megatron_ltd.settings.checks.token_drop import token_drop_violations
from megatron_ltd.settings.checks.validation import validation_violations
from megatron_ltd.settings.checks.values import repaired, value_violations
from megatron_ltd.settings.checks.vision import image_sources, vision_violations

TOKENIZER_FILES = {"GPT2BPETokenizer": "vocab_file merge_file", "SentencePieceTokenizer": "tokenizer_model",
                   "HuggingFaceTokenizer": "tokenizer_model", "BertWordPieceLowerCase": "vocab_file",
                   "BertWordPieceCase": "vocab_file"}
"""Kind of tokenizer -> settings that it needs."""


LONGEST = 2000
"""Characters of a message, in which a value of any length is repeated."""

BUDGETS = "train_iters train_samples train_tokens train_epochs"
"""Settings that say how long a run is."""


def check(config: RunConfig, world_size: int) -> None:
    """Reject settings that cannot run.

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
    found = [text if len(text) <= LONGEST else f"{text[:LONGEST // 2]} ... {text[-LONGEST // 2:]}" for text in problems]
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        raise ConfigError(f"{len(found)} problems in the settings:\n" + "\n".join(f"  - {text}" for text in found))


def violations(config: RunConfig, world_size: int) -> list[str]:
    """One message for each thing that is wrong; empty for settings that can run."""
    values = dict(value_violations(config))
    budget = _budget(config)
    # The arithmetic needs sizes that are positive. What it finds with a stand-in for one of them is not reported.
    together = _together(repaired(config, values), world_size, bool(budget))
    stand_ins = tuple(f"{flag.name} " for flag in values)
    return [*values.values(), *budget, *_data(config),
            *(text for text in together if not any(flag in text for flag in stand_ins))]


def _together(config: RunConfig, world_size: int, no_budget: bool) -> list[str]:
    """What is wrong with settings that are right one by one."""
    layout = list(layout_violations(config, world_size))
    dropping = list(token_drop_violations(config))
    problems = [*_model(config), *attention_violations(config), *excluded_settings(config), *exceeded_limits(config),
                *dropping, *vision_violations(config), *_retained(config), *bad_step_violations(config), *layout]
    in_tokens = config.training.token_budget == "layer" or config.optimizer.layer_token_lr or reads_vary(config)
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
    if heads % model.query_groups:
        yield (f"--num-query-groups = {model.query_groups}: does not divide --num-attention-heads = {heads}; "
               "choose a divisor")
    if model.parametrization == "completep" and None in (model.base_hidden_size, model.base_num_layers):
        yield ("--parametrization = completep: needs the size of the base model; give --base-hidden-size and "
               "--base-num-layers, those of the model that the settings were tuned on")
    if model.parametrization == "completep" and config.optimizer.optimizer == "sgd":
        yield ("--parametrization = completep: its learning rates are those of AdamW and Muon; choose --optimizer adam "
               "or muon, or leave --parametrization out")
    if model.ffn < 1:
        yield (f"--hidden-size = {model.hidden_size}: too small for the default width of a SwiGLU MLP; "
               "give --ffn-hidden-size")


def _budget(config: RunConfig) -> list[str]:
    found = [flag.spoken(flag.of(config)) for flag in given(config, BUDGETS)]
    if found and (len(found) == 1 or config.training.train_epochs is None):
        return []
    return [f"{' and '.join(found) + ' are given' if found else 'no training budget is given'}: the length of the run "
            f"needs one of {', '.join(map(flag_name, BUDGETS.split()))}; "
            + ("epochs stand alone: keep one" if found else "add one")]


def notes(config: RunConfig, world_size: int) -> list[str]:
    """What is unusual about settings that can run, one sentence each."""
    budgets = [flag.spoken(flag.of(config)) for flag in given(config, BUDGETS)]
    several = f"{' and '.join(budgets)}: the run ends with the budget that is used up first"
    of_rate = list(learning_rate_notes(config, world_size)) if length_is_given(config) else []
    return [several, *of_rate] if len(budgets) > 1 else of_rate


def _length(config: RunConfig, world_size: int) -> Iterator[str]:
    """Whether the budget is enough for one step."""
    if total_steps(config, data_parallel_size(config, world_size)) < 1:
        budgets = [flag.spoken(flag.of(config)) for flag in given(config, "train_samples train_tokens")]
        yield f"{' and '.join(budgets)}: less than one global batch; give more, or lower --global-batch-size"


def _data(config: RunConfig) -> Iterator[str]:
    if config.model.family == "vit":
        yield from image_sources(config)
        return
    corpora = [flag.name for flag in given(config, "mock_data data_path")]
    separate = [flag.name for flag in given(config, "train_data_path valid_data_path test_data_path")]
    lines = [flag.name for flag in given(config, "train_jsonl valid_jsonl test_jsonl")]
    if lines and corpora + separate:
        yield (f"{lines[0]} and {(corpora + separate)[0]} are given: a run reads prompts and responses or a corpus; "
               "keep one")
    elif len(corpora) + bool(separate) > 1:
        yield (f"{' and '.join(corpora + separate)} are given: the corpus must come from one of --data-path, separate "
               "paths for each split, or --mock-data; keep one")
    elif not lines and not corpora and not separate:
        yield "no corpus is given; add --data-path PREFIX, or --mock-data for a throughput run"
    elif separate and config.data.train_data_path is None:
        yield f"{separate[0]} is given without --train-data-path: there is nothing to train on; add it"
    yield from validation_violations(config)
    yield from _split(config.data.split)
    yield from _tokenizer(config)


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
    if kind is None and not (data.mock_data and config.model.vocab_size is not None):
        yield ("--tokenizer-type is required, as the corpus was made with one; name it, or for a corpus of numbers "
               "use --tokenizer-type NullTokenizer --vocab-size N (--mock-data needs only --vocab-size)")
    yield from (f"--tokenizer-type = {kind}: needs {flag_name(field)}; add its path"
                for field in TOKENIZER_FILES.get(kind or "", "").split() if getattr(data, field) is None)
    if kind == "NullTokenizer" and config.model.vocab_size is None:
        yield "--tokenizer-type = NullTokenizer: needs --vocab-size; give the number of token ids"


def _retained(config: RunConfig) -> Iterator[str]:
    interval, retain = config.checkpoint.save_interval, config.checkpoint.save_retain_interval
    if retain is not None and (interval is None or retain % interval):
        yield (f"--save-retain-interval = {retain}: no checkpoint to keep unless it is a multiple of --save-interval = "
               f"{interval}; choose a multiple")
    upload, save = config.checkpoint.upload, config.checkpoint.save
    if upload and save and not is_url(upload) and Path(upload).resolve() == Path(save).resolve():
        yield f"--upload = {upload}: is --save itself; name another folder"
