"""What ViT's settings must be, and the ones that follow from others."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_ltd.config import ModelConfig, RunConfig

DEFAULTS = {"img_h": 224, "img_w": 224, "patch_dim": 16, "num_channels": 3, "num_classes": 1000}


def with_image_sizes(model: ModelConfig, given: ModelConfig) -> ModelConfig:
    """ViT's sizes: those given, else those of the model (of a checkpoint), else the defaults; and its sequence length.

    Sizes that do not fit are left for `vision_violations`.
    """
    sizes: dict[str, Any] = dict(DEFAULTS)
    for source in (model, given):
        sizes |= {name: getattr(source, name) for name in DEFAULTS if getattr(source, name) is not None}
    model = replace(model, **sizes)
    if min(sizes.values()) < 1 or given.seq_length:
        return replace(model, seq_length=given.seq_length)
    rows, columns = model.grid
    return replace(model, seq_length=rows * columns + 1, max_position_embeddings=None)


def vision_violations(config: RunConfig) -> Iterator[str]:
    """Everything that is particular to ViT; and its settings where the model is another."""
    model = config.model
    if model.family != "vit":
        yield from (f"--{name.replace('_', '-')} = {getattr(model, name)} is given, but this is no run of ViT; leave "
                    "it out, or use megatron_ltd.finetune_vit" for name in DEFAULTS if getattr(model, name) is not None)
        if config.data.image_augmentation != "none":
            yield (f"--image-augmentation = {config.data.image_augmentation} is given, but this is no run of ViT; "
                   "leave it out")
        return
    if model.img_h is None or model.img_w is None or model.patch_dim is None:
        return  # one of them was given a value that no number of pixels can have
    whole = True
    for flag, size in (("--img-h", model.img_h), ("--img-w", model.img_w)):
        if size % model.patch_dim:
            whole = False
            nearest = max(1, size // model.patch_dim) * model.patch_dim
            yield f"{flag} = {size}: not divisible by --patch-dim = {model.patch_dim}; choose for example {nearest}"
    rows, columns = model.grid
    if whole and model.seq_length != rows * columns + 1:
        yield (f"--seq-length = {model.seq_length}: images of {rows} x {columns} patches and the class token are "
               f"{rows * columns + 1} tokens; leave it out")
    if config.parallel.pipeline_model_parallel_size > 1:
        yield (f"--pipeline-model-parallel-size = {config.parallel.pipeline_model_parallel_size}: ViT runs with tensor "
               "and data parallelism; leave it out")
    if model.position_embedding_type != "learned_absolute":
        yield f"--position-embedding-type = {model.position_embedding_type}: ViT learns positions; leave it out"


def image_sources(config: RunConfig) -> Iterator[str]:
    """Whether there are images, and nothing else, to read."""
    data = config.data
    for flag, given in (("--data-path", data.data_path is not None), ("--train-jsonl", data.train_jsonl is not None),
                        ("--mock-data", data.mock_data), ("--tokenizer-type", data.tokenizer_type is not None)):
        if given:
            yield f"{flag} is given, but ViT reads images; leave it out, and name them by --train-data-path"
    if data.train_data_path is None:
        yield "no images are given; add --train-data-path FOLDER, or --train-data-path IMAGES.idx LABELS.idx"
    for name in ("train", "valid", "test"):
        paths = getattr(data, f"{name}_data_path")
        if paths is not None and len(paths) > 2:
            yield (f"--{name}-data-path = {' '.join(paths)}: {len(paths)} paths; give a folder, or an idx file of "
                   "images and one of labels")
