"""A finetuning run: a pretrained model is trained for whole epochs and validated after each."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.build import Datasets
from megatron_ltd.data.finetuning.build import Epoch, describe, of_epochs, text_epoch
from megatron_ltd.data.held_out import named_sets
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.data.vision.images import augmented, image_epoch
from megatron_ltd.log import Console
from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.derived import global_batch_size, total_samples, total_steps
from megatron_ltd.settings.checks.all import check
from megatron_ltd.train.pretrain import read_together
from megatron_ltd.train.process.launch import Runtime

GROWING_SHARE = 0.3
"""Share of the steps over which the kept length grows, as in the published GPT-2 finetuning runs."""


def prepare(config: RunConfig, tokenizer: Tokenizer | None, runtime: Runtime, console: Console,
            ramp: BatchRamp) -> tuple[RunConfig, Datasets]:
    """The data sets, and the settings completed with what follows from their sizes.

    Args:
        ramp: the run's batch sizes.

    Raises:
        ConfigError: the settings do not fit an epoch of this length.
        DataError: on every process, if one of them cannot read its data or reads other data.
    """
    read_epoch = image_epoch if config.model.family == "vit" else text_epoch
    epoch = read_together(lambda: read_epoch(config, tokenizer), lambda epoch: _digest(tokenizer, epoch))
    dp = runtime.mesh.dp_size
    config = with_epoch(config, len(epoch[0]), dp, ramp)
    check(config, runtime.launch.world_size)
    batch = global_batch_size(config, dp)
    for line in [*describe(epoch), *_scored_in_part(epoch, config, batch)]:
        console.line(line)
    drop = config.token_drop
    growth = f", tokens are dropped in the first {drop.random_ltd_steps}" if drop.random_ltd_steps is not None else ""
    console.line(f"{total_steps(config, dp, ramp)} steps of {batch} samples{growth}")
    datasets = of_epochs(epoch, config, total_samples(config, dp, ramp), batch)
    return config, datasets if config.model.family != "vit" else augmented(datasets, config)


def _scored_in_part(epoch: Epoch, config: RunConfig, batch_samples: int) -> Iterator[str]:
    """What to tell of held-out sets that are larger than what is scored of them."""
    _, valid, test = epoch
    scored = config.logging.eval_iters * batch_samples
    for name, part in named_sets(valid).items() if not config.logging.full_validation else ():
        if len(part) > scored > 0:
            yield (f"validation{name and ' on ' + name} scores the first {scored} of {len(part)} samples; raise "
                   "--eval-iters, or give --full-validation, for all")
    if test is not None and len(test) > scored > 0:
        yield f"the test scores the first {scored} of {len(test)} samples; raise --eval-iters for all"


def with_epoch(config: RunConfig, epoch_samples: int, dp: int, ramp: BatchRamp | None = None) -> RunConfig:
    """The settings with the length of an epoch, and with random-LTD's default schedule, which ends after 30% of the
    steps. Args: see `total_steps`."""
    config = replace(config, training=replace(config.training, epoch_samples=epoch_samples))
    drop = config.token_drop
    if drop.policy != "random" or drop.random_ltd_steps is not None or drop.random_ltd_length_list is not None:
        return config
    if config.training.token_budget == "layer":
        return config  # the number of steps then follows from the schedule
    steps = max(1, round(GROWING_SHARE * total_steps(config, dp, ramp)))
    return replace(config, token_drop=replace(drop, **{"random_ltd_steps": steps}))


def _digest(tokenizer: Tokenizer | None, epoch: Epoch) -> str:
    parts = ["" if tokenizer is None else tokenizer.digest]
    parts += ["none" if dataset is None else dataset.digest for dataset in epoch]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
