"""Where a run starts: from scratch, from its own checkpoint, or from the weights of another run."""

from dataclasses import fields
from pathlib import Path

import torch.distributed as dist

from megatron_ltd.checkpoint.agreement import gather_json
from megatron_ltd.checkpoint.io import agree_on_checkpoint, newest_sound_before, read_on_all_ranks
from megatron_ltd.checkpoint.layout import holds_nothing
from megatron_ltd.checkpoint.saved_settings import TOKENIZER_SETTINGS, fallback, ignored_settings, saved_config
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.text.other_tokens import other_tokens
from megatron_ltd.data.text.tokenizer import tokenizer_of_model
from megatron_ltd.errors import CheckpointError, DamagedCheckpointError, UserError, flag_name
from megatron_ltd.log import Console
from megatron_ltd.optim.build import ShardedOptimizer
from megatron_ltd.optim.loss_scale import LossScale
from megatron_ltd.plan.batch_ramp import BatchRamp
from megatron_ltd.plan.derived import batch_ramp, global_batch_size, long_samples
from megatron_ltd.train import state
from megatron_ltd.train.adapt import Adaptation, adaptation
from megatron_ltd.train.setup import Model
from megatron_ltd.train.state import TrainState


def starts_fresh(config: RunConfig) -> bool:
    """Whether the run starts from scratch: without --load, or if --load is also --save and still empty, so that one
    command both starts and resumes a run."""
    load, save = config.checkpoint.load, config.checkpoint.save
    if load is None:
        return True
    return save is not None and Path(load).resolve() == Path(save).resolve() and holds_nothing(Path(load))


def restore(config: RunConfig, model: Model, optimizer: ShardedOptimizer, group: dist.ProcessGroup | None,
            console: Console) -> TrainState:
    """Load model and optimizer from --load, if it is given.

    Raises:
        CheckpointError: on all ranks; the checkpoint is missing, damaged, or does not fit.
    """
    if starts_fresh(config):
        return TrainState(loss_scale=LossScale.initial(config.training))
    assert config.checkpoint.load is not None
    path = agree_on_checkpoint(Path(config.checkpoint.load), group, config.checkpoint.ckpt_step, console)
    try:
        return _restore_from(path, config, model, optimizer, group, console)
    except DamagedCheckpointError as error:
        sound = fallback(config, error, newest_sound_before(path, group))
        console.warn(f"{error}\n--load-fallback: this run continues from {sound}, the newest sound checkpoint. The "
                     "steps after it are trained again")
    return _restore_from(sound, config, model, optimizer, group, console)


def roll_back(path: Path, model: Model, optimizer: ShardedOptimizer, group: dist.ProcessGroup | None,
              counters: TrainState) -> None:
    """Return to a checkpoint of this run, in the middle of it.

    Raises:
        CheckpointError: on all ranks; the checkpoint is missing or damaged.
    """
    model.after_evaluation()
    restored = TrainState.from_counters(state.load(path, model, optimizer, group, importance=True).counters)
    for entry in fields(restored):
        setattr(counters, entry.name, getattr(restored, entry.name))


def known_tokens(config: RunConfig) -> int:
    """The tokens of a model's own tokenizer, which may be fewer than it has rows for; if the files are not there, its
    rows."""
    rows = config.model.vocab_size or 0
    if config.data.tokenizer_type is None or config.model.family == "vit":
        return rows
    try:
        return min(rows, tokenizer_of_model(config.data, rows).vocab_size)
    except UserError:
        return rows


def batch_sizes(config: RunConfig, dp: int, group: dist.ProcessGroup | None) -> BatchRamp:
    """The batch sizes of the run, of which --load says what its earlier steps have read.

    Raises:
        CheckpointError: on all ranks; there is no checkpoint.
    """
    ramp = batch_ramp(config, dp)
    if starts_fresh(config) or config.checkpoint.finetune:
        return ramp
    assert config.checkpoint.load is not None
    path = agree_on_checkpoint(Path(config.checkpoint.load), group, config.checkpoint.ckpt_step, Console(False))
    try:
        counters = read_on_all_ranks(path, group).counters
    except DamagedCheckpointError:
        return ramp  # `restore` says what is wrong, and what it continues from instead
    consumed = TrainState.from_counters(counters).consumed
    return ramp.going_on(consumed.steps, consumed.samples)


def check_samples_read(config: RunConfig, dp: int, ramp: BatchRamp, state: TrainState, console: Console) -> None:
    """Check that earlier steps have read as many samples as these settings say, if it follows from that which samples
    are long ones; and tell of a batch size that has changed with the number of processes.

    Args:
        ramp: for which the data were read.

    Raises:
        CheckpointError: they have not, or are others than those for which the data were read.
    """
    if ramp.going_on(state.consumed.steps, state.consumed.samples) != ramp:
        raise CheckpointError(
            f"--load = {config.checkpoint.load}: the {state.consumed.steps} steps of the newest sound checkpoint have "
            f"read {state.consumed.samples} samples, in other batches than this run's; start again with --ckpt-step "
            f"{state.consumed.steps}, so that the run is planned from there")
    read, expected = state.consumed.samples, batch_ramp(config, dp).samples_after(state.consumed.steps)
    if config.training.global_batch_size is None and read != expected:
        console.line(f"continuing with {global_batch_size(config, dp)} samples a step, which follow from "
                     f"--micro-batch-size and {dp} data-parallel processes; the {state.consumed.steps} steps so far "
                     f"have read {read} samples. --global-batch-size keeps a batch size on any number of processes")
    if long_samples(config, dp) is not None and read != expected:
        raise CheckpointError(
            f"--load = {config.checkpoint.load}: its {state.consumed.steps} steps have read {read} samples, and with "
            f"this run's batch sizes they read {expected}; with --token-superposition-text = more the batch size "
            "cannot change, since it decides which samples are long. Give the --global-batch-size and "
            "--rampup-batch-size of the earlier run")


def _restore_from(path: Path, config: RunConfig, model: Model, optimizer: ShardedOptimizer,
                  group: dist.ProcessGroup | None, console: Console) -> TrainState:
    settings, fresh = config.checkpoint, TrainState(loss_scale=LossScale.initial(config.training))
    manifest = read_on_all_ranks(path, group)
    state.check_model_settings(config, manifest, path)
    weights_only = settings.finetune or settings.no_load_optim
    if not weights_only:
        state.check_optimizer(config, manifest, path)
    goes_on = not settings.finetune and state.IMPORTANCE in manifest.tensors
    adapt = Adaptation()
    if settings.finetune:
        saved, known, tokens = saved_config(manifest, path), 0, 0
        if settings.resize_vocabulary:
            known, tokens = gather_json([known_tokens(saved), known_tokens(config)], group)[0]
        adapt = adaptation(config.model, manifest, saved.model, known=known, tokens=tokens)
    state.load(path, model, None if weights_only else optimizer, group, importance=goes_on, adapt=adapt)
    ignored = ignored_settings(manifest)
    if ignored:
        console.line(f"{path} has settings that this version does not know, at their defaults: {', '.join(ignored)}")
    if adapt.describe():
        console.line(adapt.describe())
    if model.importance is not None and not goes_on:
        console.line("the importance of tokens is learned afresh: it is not taken from the checkpoint")
    console.line(f"loaded {path}" + (" (weights only)" if weights_only else ""))
    _note_other_tokens(config, saved_config(manifest, path), console)
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


def _note_other_tokens(config: RunConfig, before: RunConfig, console: Console) -> None:
    """Warn of a tokenizer whose ids are not those with which the weights were trained."""
    mine, own = ([getattr(run.data, name) for name in TOKENIZER_SETTINGS] for run in (config, before))
    if not console.speaks or mine == own or config.model.family == "vit" or config.data.tokenizer_type is None:
        return
    told = other_tokens(tokenizer_of_model(config.data, config.model.vocab_size), before.data)
    if told is not None:
        console.warn(told)


def _note_changes(config: RunConfig, before: RunConfig, console: Console) -> None:
    """Report settings that differ from those of the resumed run, so that changed data or a changed learning rate does
    not go unnoticed. The layout may change freely."""
    saved, mine = before.to_dict(), config.to_dict()
    for section in ("training", "optimizer", "data", "token_drop", "parallel"):
        for name, value in mine[section].items():
            if saved[section][name] != value:
                console.line(f"continuing with {flag_name(name)} = {value}; it was {saved[section][name]}")
