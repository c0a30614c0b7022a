"""Samples of ViT: an image as numbers from -1 to 1, and its class."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.build import Datasets
from megatron_ltd.data.finetuning.build import Epoch
from megatron_ltd.data.sample import Dataset, Sample, check_index
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.data.vision.image_files import ImageShape, LabelledImages, read_images

SHIFT_SHARE = 8
"""Images are shifted by up to this fraction (one eighth) of their size."""


class ImageDataset:
    """Images scaled from [0, 255] to [-1, 1], as ViT's published models read them."""

    def __init__(self, images: LabelledImages):
        self.images, self.digest = images, images.digest

    def __len__(self) -> int:
        return len(self.images.labels)

    def sample(self, index: int) -> Sample:
        """Shapes: tokens [c, H, W] float32, labels [1] int64, loss_mask [1] float32"""
        check_index(index, self)
        pixels = self.images.pixels(index).astype(np.float32)
        return {"tokens": pixels / np.float32(127.5) - np.float32(1.0), "labels": self.images.labels[index:index + 1],
                "loss_mask": np.ones(1, dtype=np.float32)}


class AugmentedDataset:
    """Images shifted and mirrored at random, a function of the seed and the index in the run's stream of samples, so
    that an image looks different in each epoch. What is shifted in is black."""

    def __init__(self, base: Dataset, kind: Literal["crop", "crop-flip"], seed: int):
        self.base, self._kind, self._seed = base, kind, seed
        self.digest = hashlib.sha256(f"augmented {base.digest} {kind} {seed}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.base)

    def sample(self, index: int) -> Sample:
        sample = self.base.sample(index)
        image = sample["tokens"]
        random = np.random.default_rng([self._seed, index])
        margins = [size // SHIFT_SHARE for size in image.shape[1:]]
        top, left = (int(random.integers(0, 2 * margin + 1)) for margin in margins)
        padded = np.pad(image, ((0, 0), *((margin, margin) for margin in margins)), constant_values=-1.0)
        image = padded[:, top:top + image.shape[1], left:left + image.shape[2]]
        if self._kind == "crop-flip" and random.random() < 0.5:
            image = image[:, :, ::-1]
        return {**sample, "tokens": np.ascontiguousarray(image)}


def image_epoch(config: RunConfig, tokenizer: Tokenizer | None) -> Epoch:
    """One epoch of the images.

    Raises:
        DataError: they are missing, damaged, or do not fit the model.
    """
    model, data = config.model, config.data
    assert model.num_channels and model.img_h and model.img_w and model.num_classes and data.train_data_path
    shape, classes = ImageShape(model.num_channels, model.img_h, model.img_w), model.num_classes
    train = read_images("--train-data-path", data.train_data_path, shape, classes)

    def held_out(flag: str, paths: Sequence[str] | None) -> ImageDataset | None:
        return ImageDataset(read_images(flag, paths, shape, classes, train.class_names)) if paths else None

    return (ImageDataset(train), held_out("--valid-data-path", data.valid_data_path),
            held_out("--test-data-path", data.test_data_path))


def augmented(datasets: Datasets, config: RunConfig) -> Datasets:
    """With the training images changed as the settings ask."""
    kind = config.data.image_augmentation
    if kind == "none":
        return datasets
    return datasets._replace(train=AugmentedDataset(datasets.train, kind, config.training.seed))
