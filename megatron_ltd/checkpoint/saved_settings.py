"""The settings with which a checkpoint was written, as far as this version knows them."""

import dataclasses
from pathlib import Path
from typing import Any

import megatron_ltd
from megatron_ltd.checkpoint.layout import defect, find_checkpoint, older_than
from megatron_ltd.checkpoint.manifest import Manifest, read_manifest
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import CheckpointError, flag_name
from megatron_ltd.log import Console
from megatron_ltd.model.arithmetic.parts import PARTS

TOKENIZER_SETTINGS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "eod_token")


def saved_config(manifest: Manifest, path: Path) -> RunConfig:
    """The settings of the run that wrote a checkpoint. Those that this version does not know are left out if they were
    at their defaults.

    Raises:
        CheckpointError: they cannot be used by this version.
    """
    known = _known_names()
    writer = manifest.versions.get("megatron_ltd")
    refused = [f"{flag_name(name)} = {value}" for section, name, value in _unknown(manifest)
               if manifest.changed is None or name in manifest.changed.get(section, ())]
    if refused:
        whose = "which may differ from their defaults" if manifest.changed is None else "and not at their defaults"
        raise CheckpointError(
            f"{path} was written by megatron_ltd {writer} with settings that this version "
            f"({megatron_ltd.__version__}) does not know, {whose}: {', '.join(refused)}. Use a version that "
            f"knows them, such as {writer}")
    try:
        return RunConfig.from_dict({section: {name: value for name, value in manifest.config.get(section, {}).items()
                                              if name in names} for section, names in known.items()})
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no settings of megatron_ltd: {error}") from error


def with_checkpoint_model(config: RunConfig) -> RunConfig:
    """With --use-checkpoint-args, take the model's settings from the checkpoint, except dropout, which may differ
    between runs of one model, and the tokenizer's where they are not given. A run that starts from its weights may give
    the model parts that it does not have.

    Raises:
        CheckpointError: there is no readable checkpoint.
    """
    if not config.checkpoint.use_checkpoint_args:
        return config
    if config.checkpoint.load is None:
        raise CheckpointError("--use-checkpoint-args takes the model's settings from a checkpoint; name it with --load")
    path = find_checkpoint(Path(config.checkpoint.load), config.checkpoint.ckpt_step, Console(False))
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        complete = next((older for older in older_than(path) if defect(older) is None), None)
        path = fallback(config, error, complete)
        manifest = read_manifest(path)
    saved = saved_config(manifest, path)
    tokenizer = {name: getattr(saved.data, name) for name in TOKENIZER_SETTINGS if getattr(config.data, name) is None}
    own = ["hidden_dropout", "attention_dropout"]
    if config.checkpoint.finetune and saved.model.family == "gpt":
        own += [name for part in PARTS if part.is_new(vars(saved.model), vars(config.model)) for name in part.free]
    model = dataclasses.replace(saved.model, **{name: getattr(config.model, name) for name in own})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **tokenizer), model=model)


def fallback(config: RunConfig, error: CheckpointError, sound: Path | None) -> Path:
    """What --load-fallback continues from after an error.

    Raises:
        CheckpointError: there is nothing sound, or the flag is not given.
    """
    if sound is None:
        raise error
    if not config.checkpoint.load_fallback:
        raise CheckpointError(f"{error}\nThe newest sound checkpoint is {sound}; --load-fallback continues from it"
                              ) from error
    return sound


def ignored_settings(manifest: Manifest) -> list[str]:
    """What `saved_config` leaves out, as flags with values."""
    return [f"{flag_name(name)} = {value}" for _, name, value in _unknown(manifest)]


def _unknown(manifest: Manifest) -> list[tuple[str, str, Any]]:
    """(section, name, value) of the settings that this version does not know."""
    known = _known_names()
    return [(section, name, value) for section, values in manifest.config.items() if isinstance(values, dict)
            for name, value in values.items() if name not in known.get(section, ())]


def _known_names() -> dict[str, list[str]]:
    """The settings of this version by section."""
    return {section.name: [entry.name for entry in dataclasses.fields(getattr(RunConfig(), section.name))]
            for section in dataclasses.fields(RunConfig)}
