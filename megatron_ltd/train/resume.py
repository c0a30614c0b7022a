"""Where a run starts: from scratch, from its own checkpoint, or from the weights of another run."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_ltd.checkpoint.io import agree_on_checkpoint
from megatron_ltd.checkpoint.layout import find_checkpoint, holds_nothing
from megatron_ltd.checkpoint.manifest import Manifest, read_manifest
from megatron_ltd.config import RunConfig
from megatron_ltd.errors import CheckpointError
from megatron_ltd.log import Console
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.loss_scale import LossScale
from megatron_ltd.train import state
from megatron_ltd.train.adapt import Adaptation, adaptation
from megatron_ltd.train.setup import Model
from megatron_ltd.train.state import TrainState


def saved_config(manifest: Manifest, path: Path) -> RunConfig:
    """The settings of the run that wrote a checkpoint.

    Raises:
        CheckpointError: they are not those of this version.
    """
    try:
        return RunConfig.from_dict(manifest.config)
    except TypeError as error:
        raise CheckpointError(f"{path} was written by another version of megatron_ltd "
                              f"({manifest.versions.get('megatron_ltd')}): {error}") from error


def with_checkpoint_model(config: RunConfig) -> RunConfig:
    """With --use-checkpoint-args, the model's settings are the checkpoint's; what may differ between runs of one model
    (dropout) stays as given.

    Raises:
        CheckpointError: there is no readable checkpoint.
    """
    if not config.checkpoint.use_checkpoint_args:
        return config
    if config.checkpoint.load is None:
        raise CheckpointError("--use-checkpoint-args takes the model's settings from a checkpoint; name it with --load")
    path = find_checkpoint(Path(config.checkpoint.load), config.checkpoint.ckpt_step, Console(False))
    saved = saved_config(read_manifest(path), path).model
    return replace(config, model=replace(saved, hidden_dropout=config.model.hidden_dropout,
                                         attention_dropout=config.model.attention_dropout))


def starts_fresh(config: RunConfig) -> bool:
    """Without --load; or where --load is also --save and holds nothing yet, so that one command both starts a run and
    continues it."""
    load, save = config.checkpoint.load, config.checkpoint.save
    if load is None:
        return True
    return save is not None and Path(load).resolve() == Path(save).resolve() and holds_nothing(Path(load))


def restore(config: RunConfig, model: Model, optimizer: ShardedOptimizer, group: dist.ProcessGroup | None,
            console: Console) -> TrainState:
    """Fill model and optimizer from --load, if there is something to load.

    Raises:
        CheckpointError: on all ranks; nothing to load, or it is damaged, or does not fit.
    """
    fresh = TrainState(loss_scale=LossScale.initial(config.training))
    if starts_fresh(config):
        return fresh
    settings = config.checkpoint
    assert settings.load is not None
    path = agree_on_checkpoint(Path(settings.load), group, settings.ckpt_step, console)
    manifest = read_manifest(path)
    state.check_model_settings(config, manifest, path)
    weights_only = settings.finetune or settings.no_load_optim
    if not weights_only:
        state.check_optimizer(config, manifest, path)
    goes_on = not settings.finetune and manifest.stored_name(state.IMPORTANCE) is not None
    adapt = Adaptation()
    if settings.finetune and config.model.family == "vit":
        adapt = adaptation(config.model, manifest, saved_config(manifest, path).model)
    state.load(path, model, None if weights_only else optimizer, group, importance=goes_on, adapt=adapt)
    if adapt.describe():
        console.line(adapt.describe())
    if model.importance is not None and not goes_on:
        console.line("the importance of tokens is learned afresh: it is not taken from the checkpoint")
    console.line(f"loaded {path}" + (" (weights only)" if weights_only else ""))
    if settings.finetune:
        return fresh
    restored = TrainState.from_counters(manifest.counters)
    before = saved_config(manifest, path)
    _note_changes(config, before, console)
    if settings.no_load_optim:
        restored.updates = 0
    if config.training.precision != before.training.precision:
        restored.loss_scale = fresh.loss_scale
    return restored


def _note_changes(config: RunConfig, before: RunConfig, console: Console) -> None:
    """Say which settings differ from those of the run that is continued: a layout is free to change, and changed data
    or learning rate should not go unnoticed."""
    saved, mine = before.to_dict(), config.to_dict()
    for section in ("training", "optimizer", "data", "token_drop", "parallel"):
        for name, value in mine[section].items():
            if saved[section][name] != value:
                console.line(f"continuing with --{name.replace('_', '-')} = {value}; it was {saved[section][name]}")
