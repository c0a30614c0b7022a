"""Settings of a run for tools that calculate: neither corpus nor checkpoints are opened, except a checkpoint whose
settings are asked for."""

import shlex
from collections.abc import Collection
from dataclasses import replace

from megatron_ltd.checkpoint.durable import is_url
from megatron_ltd.config.files import CheckpointConfig, DataConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.settings.flag_reference import all_flags
from megatron_ltd.train.process.recipe import Recipe

VOCABULARIES = {"GPT2BPETokenizer": 50257, "BertWordPieceLowerCase": 30522, "BertWordPieceCase": 28996}
"""Vocabulary sizes of common tokenizers; only the size of the embedding and the head's FLOPs depend on them."""


def completed(recipe: Recipe, config: RunConfig, console: Console) -> RunConfig:
    """The settings as the program completes them. A checkpoint in a store is not copied here, unless the settings are
    to be its own.

    Raises:
        UserError: a checkpoint with the settings that is missing, damaged, or of another family.
    """
    settings = config.checkpoint
    if not settings.use_checkpoint_args:
        load, pretrained = (None if place is None or is_url(place) else place
                            for place in (settings.load, settings.pretrained_checkpoint))
        settings = replace(settings, load=load, pretrained_checkpoint=pretrained, upload=None)
    return recipe.completed(replace(config, checkpoint=settings), console)


def without_files(config: RunConfig) -> RunConfig:
    """The settings without the corpus and checkpoints, which are not opened.

    Raises:
        ConfigError: the vocabulary size or the length of the run is unknown.
    """
    if config.training.train_epochs is not None and config.training.epoch_samples is None:
        raise ConfigError(f"--train-epochs = {config.training.train_epochs}: how many steps that is follows from the "
                          "data, which are not read here; give --train-iters in its place")
    if config.model.family == "vit":
        return replace(config, checkpoint=CheckpointConfig(), data=DataConfig(train_data_path=("images",)))
    vocabulary = config.model.vocab_size or VOCABULARIES.get(config.data.tokenizer_type or "")
    if vocabulary is None:
        kind = config.data.tokenizer_type
        lacks = "--vocab-size is not given" if kind is None else f"--tokenizer-type = {kind}: its vocabulary is unread"
        raise ConfigError(f"{lacks}, and the head's FLOPs depend on its size; give --vocab-size")
    packed = config.data.train_jsonl is not None  # several examples in a sample, as with these two settings
    return replace(config, model=replace(config.model, vocab_size=vocabulary), checkpoint=CheckpointConfig(),
                   data=DataConfig(mock_data=True, mask_prob=config.data.mask_prob,
                                   reset_position_ids=packed or config.data.reset_position_ids,
                                   reset_attention_mask=packed or config.data.reset_attention_mask))


def with_learning_rate(config: RunConfig) -> RunConfig:
    """The settings with some learning rate, on which nothing that is calculated depends."""
    return config if config.optimizer.lr is not None else replace(config, optimizer=replace(config.optimizer, lr=1.0))


def flags_of(config: RunConfig, sections: Collection[str]) -> list[str]:
    """The flags of the settings that differ from their defaults, quoted for a shell."""
    settings = [(flag, flag.of(config)) for flag in all_flags() if flag.section in sections]
    return [flag.spoken(value) if flag.kind is bool else
            " ".join([flag.name, *map(shlex.quote, map(str, value if isinstance(value, tuple) else [value]))])
            for flag, value in settings if value != flag.default]
