"""The settings of ViT: constraints, and those that follow from others."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.settings.checks.rules import given

DEFAULTS = {"img_h": 224, "img_w": 224, "patch_dim": 16, "num_channels": 3, "num_classes": 1000}


def with_image_sizes(model: ModelConfig, given: ModelConfig) -> ModelConfig:
    """ViT's sizes: those given, else those of the model (of a checkpoint), else the defaults; and its sequence length.

    Sizes that do not fit are left for `vision_violations`.
    """
    sizes: dict[str, Any] = {
        name: next(size for size in (getattr(given, name), getattr(model, name), default) if size is not None)
        for name, default in DEFAULTS.items()}
    model = replace(model, **sizes)
    if min(sizes.values()) < 1 or given.seq_length:
        return replace(model, seq_length=given.seq_length)
    rows, columns = model.grid
    return replace(model, seq_length=rows * columns + 1, max_position_embeddings=None)


def vision_violations(config: RunConfig) -> Iterator[str]:
    """What is wrong with the sizes of ViT."""
    model = config.model
    if model.family != "vit" or model.img_h is None or model.img_w is None or model.patch_dim is None:
        return  # a size is None if its value was out of range
    rows, columns = model.grid
    uneven = [flag for flag in given(config, "img_h img_w") if flag.of(config) % model.patch_dim]
    for flag in uneven:
        fitting = max(1, flag.of(config) // model.patch_dim) * model.patch_dim
        yield (f"{flag.spoken(flag.of(config))}: not divisible by --patch-dim = {model.patch_dim}; choose for example "
               f"{fitting}")
    if not uneven and model.seq_length != rows * columns + 1:
        yield (f"--seq-length = {model.seq_length}: images of {rows} x {columns} patches and the class token are "
               f"{rows * columns + 1} tokens; leave it out")


def image_sources(config: RunConfig) -> Iterator[str]:
    """What is wrong with the data of ViT."""
    if config.data.train_data_path is None:
        yield "no images are given; add --train-data-path FOLDER, or --train-data-path IMAGES.idx LABELS.idx"
    for flag in given(config, "train_data_path valid_data_path test_data_path"):
        if len(flag.of(config)) > 2:
            yield (f"{flag.spoken(flag.of(config))}: {len(flag.of(config))} paths; give a folder, or an idx file of "
                   "images and one of labels")
