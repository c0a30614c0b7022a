"""A finetuning run: a pretrained model is trained for whole epochs and validated after each."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_ltd.checkpoint.layout import holds_nothing
from megatron_ltd.config import Family, RunConfig
from megatron_ltd.data.build import Datasets
from megatron_ltd.data.finetuning.build import Epoch, describe, of_epochs
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.data.vision.images import augmented
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.plan.derived import global_batch_size, total_samples, total_steps
from megatron_ltd.settings.checks.all import check
from megatron_ltd.settings.checks.rules import finetuning_violations
from megatron_ltd.settings.checks.vision import with_image_sizes
from megatron_ltd.settings.cli import parse_run_config
from megatron_ltd.train.pretrain import read_together, require_family, run_recipe
from megatron_ltd.train.process.launch import Runtime
from megatron_ltd.train.resume import with_checkpoint_model

START_TOKENS = 128
GROWING_SHARE = 0.3
"""Share of the steps over which the kept length grows, as in the published GPT-2 finetuning runs."""
ReadEpoch = Callable[[RunConfig, Tokenizer | None], Epoch]


def main(arguments: list[str] | None, family: Family, read_epoch: ReadEpoch) -> int:
    """Run and return the exit code; errors the user can fix are printed as one message.

    Args:
        arguments: command line without the program name; None: that of this process.
        read_epoch: reads the data sets of one epoch.
    """
    return run_recipe(arguments, lambda words, console: read_settings(words, family, console), finetuning_violations,
                      lambda config, tokenizer, runtime, console: prepare(config, tokenizer, runtime, console,
                                                                          read_epoch))


def read_settings(arguments: list[str], family: Family, console: Console) -> RunConfig:
    """The unchecked settings of a finetuning run of this model family.

    Raises:
        UserError: flags or files that cannot be read, or a checkpoint of another family.
    """
    config, notes = parse_run_config(arguments, family, finetuning=True)
    for note in notes:
        console.line(note)
    config = from_pretrained(config, console)
    given = config.model
    config = with_checkpoint_model(config)
    require_family(config, family, "finetune")
    if family == "vit":
        config = replace(config, model=with_image_sizes(config.model, given))
    if config.checkpoint.use_checkpoint_args and family == "gpt" and given.seq_length:
        # Samples may be shorter than those the model was trained on; its number of positions stays.
        positions = config.model.max_positions
        config = replace(config, model=replace(config.model, seq_length=given.seq_length,
                                               max_position_embeddings=positions))
    return with_start_length(config)


def from_pretrained(config: RunConfig, console: Console) -> RunConfig:
    """With --pretrained-checkpoint, the run starts from it as long as --load holds no checkpoint."""
    settings = config.checkpoint
    if settings.pretrained_checkpoint is None:
        return config
    if settings.finetune and settings.load is not None:
        raise ConfigError(f"--finetune is given with --pretrained-checkpoint = {settings.pretrained_checkpoint}: the "
                          f"model to start from would be both that and --load = {settings.load}; leave --finetune out")
    if settings.load is not None and not holds_nothing(Path(settings.load)):
        console.line(f"continuing from --load = {settings.load}; --pretrained-checkpoint is ignored")
        return config
    return replace(config, checkpoint=replace(settings, load=settings.pretrained_checkpoint, finetune=True))


def with_start_length(config: RunConfig) -> RunConfig:
    """By default random-LTD keeps 128 tokens at first, or half of a shorter sample, in whole strata."""
    drop, length = config.token_drop, config.model.seq_length
    if drop.policy != "random" or drop.random_ltd_start_length is not None or drop.random_ltd_length_list is not None:
        return config
    strata = max(1, drop.random_ltd_strata)
    start = max(strata, min(START_TOKENS, length // 2) // strata * strata)
    return replace(config, token_drop=replace(drop, **{"random_ltd_start_length": start}))


def prepare(config: RunConfig, tokenizer: Tokenizer | None, runtime: Runtime, console: Console,
            read_epoch: ReadEpoch) -> tuple[RunConfig, Datasets]:
    """The data sets, and the settings completed with what follows from their sizes.

    Raises:
        ConfigError: the settings do not fit an epoch of this length.
        DataError: on every process, if one of them cannot read its data or reads other data.
    """
    epoch = read_together(lambda: read_epoch(config, tokenizer), lambda epoch: _digest(tokenizer, epoch))
    dp = runtime.mesh.dp_size
    config = with_epoch(config, len(epoch[0]), dp)
    check(config, runtime.launch.world_size)
    batch = global_batch_size(config, dp)
    for line in describe(epoch):
        console.line(line)
    scored = config.logging.eval_iters * batch
    if epoch[1] is not None and len(epoch[1]) > scored > 0:
        console.line(f"validation scores the first {scored} of {len(epoch[1])} samples; raise --eval-iters for all")
    drop = config.token_drop
    growth = f", tokens are dropped in the first {drop.random_ltd_steps}" if drop.random_ltd_steps is not None else ""
    console.line(f"{total_steps(config, dp)} steps of {batch} samples{growth}")
    datasets = of_epochs(epoch, config, total_samples(config, dp), batch)
    return config, datasets if config.model.family != "vit" else augmented(datasets, config)


def with_epoch(config: RunConfig, epoch_samples: int, dp: int) -> RunConfig:
    """The settings with the length of an epoch, and with random-LTD's default schedule, which ends after 30% of the
    steps."""
    config = replace(config, training=replace(config.training, epoch_samples=epoch_samples))
    drop = config.token_drop
    if drop.policy != "random" or drop.random_ltd_steps is not None or drop.random_ltd_length_list is not None:
        return config
    if config.training.token_budget == "layer":
        return config  # the number of steps then follows from the schedule
    steps = max(1, round(GROWING_SHARE * total_steps(config, dp)))
    return replace(config, token_drop=replace(drop, **{"random_ltd_steps": steps}))


def _digest(tokenizer: Tokenizer | None, epoch: Epoch) -> str:
    parts = ["" if tokenizer is None else tokenizer.digest]
    parts += ["none" if dataset is None else dataset.digest for dataset in epoch]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
