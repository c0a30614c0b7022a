"""Files that settings name and that are not there, told together; what is in a file is checked where it is read."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_ltd.checkpoint.durable import is_url
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.validation_sets import NAMED_PATH
from megatron_ltd.errors import CheckpointError, DataError
from megatron_ltd.settings.checks.all import TOKENIZER_FILES
from megatron_ltd.settings.checks.rules import given
from megatron_ltd.settings.flag_reference import Flag

_PART = re.compile(r"@[^@:/]+:[^@:/]+$")
_NUMBER = re.compile(r"[0-9.eE+-]+")


def missing_files(config: RunConfig) -> list[str]:
    """A sentence for each."""
    return [*_checkpoints(config), *_tokenizer(config), *_data(config)]


def refuse_missing_files(config: RunConfig) -> None:
    """Raises:
        CheckpointError, DataError: several files are missing; of one alone the program that reads it says more.
    """
    found = missing_files(config)
    if len(found) > 1:
        kind = CheckpointError if len(found) == len(list(_checkpoints(config))) else DataError
        raise kind(f"{len(found)} files are missing:\n" + "\n".join(f"  - {text}" for text in found))


def misses_checkpoint(config: RunConfig) -> bool:
    """Whether the checkpoint from which the settings are to come is not there."""
    return any(True for _ in _checkpoints(config))


def _checkpoints(config: RunConfig) -> Iterator[str]:
    # Beside --pretrained-checkpoint, --load names where the run will be.
    for flag in given(config, "load" if config.checkpoint.pretrained_checkpoint is None else "pretrained_checkpoint"):
        folder = flag.of(config)
        if folder != config.checkpoint.save and not is_url(folder) and not Path(folder).is_dir():
            yield f"{flag.spoken(folder)} is not a folder; give the folder that --save named"


def _tokenizer(config: RunConfig) -> Iterator[str]:
    kind, every = config.data.tokenizer_type, " ".join(sorted({*" ".join(TOKENIZER_FILES.values()).split()}))
    fields = every if kind is None else TOKENIZER_FILES.get(kind, "")
    for flag in given(config, f"{fields} chat_template"):
        if not Path(flag.of(config)).exists():
            yield f"{flag.name}: no file {flag.of(config)}"


def _data(config: RunConfig) -> Iterator[str]:
    for flag in given(config, "data_path train_data_path valid_data_path test_data_path"):
        for path in _paths(flag, config):
            file = path if config.model.family == "vit" else f"{path}.idx"
            if not Path(file).exists():
                yield f"{flag.name}: no file {file}"
    for flag in given(config, "train_jsonl valid_jsonl test_jsonl"):
        yield from (f"{flag.name} = {path}: no such file" for path in _paths(flag, config)
                    if not Path(path).exists() and not glob.glob(path, recursive=True))


def _paths(flag: Flag, config: RunConfig) -> Iterator[str]:
    """The paths of a flag, without weights, names of validation sets and parts of corpora."""
    for value in flag.of(config):
        named = NAMED_PATH.fullmatch(value) if flag.field.startswith("valid") else None
        path = _PART.sub("", value if named is None else named[2])
        if not _NUMBER.fullmatch(path):
            yield path
