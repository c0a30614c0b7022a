"""Labelled images from files: a folder of images for each class, or the idx files of MNIST."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801  # bytes in three dimensions and in one


@dataclass(frozen=True)
class ImageShape:
    """What a model reads."""

    channels: int
    height: int
    width: int


def read_images(flag: str, paths: Sequence[str], shape: ImageShape, classes: int,
                class_names: Sequence[str] | None = None) -> "LabelledImages":
    """The images that a flag names.

    Args:
        classes: how many the model distinguishes.
        class_names: of the training set's folders, which number the classes; None: those of this set do.

    Raises:
        DataError: files are missing, damaged, or do not fit the model.
    """
    found = (IdxImages(flag, Path(paths[0]), Path(paths[1]), shape) if len(paths) == 2
             else FolderImages(flag, Path(paths[0]), shape, class_names))
    largest = int(found.labels.max())
    if largest >= classes:
        raise DataError(f"{flag} = {' '.join(paths)}: it has {largest + 1} classes, and the model has {classes}; "
                        f"use --num-classes {largest + 1}")
    return found


class IdxImages:
    """Two idx files, plain or .gz; all images are held in memory.

    Attributes:
        labels: class of each image, [n] int64.
        digest: SHA-256 of all that decides images and classes.
    """

    class_names = None

    def __init__(self, flag: str, images: Path, labels: Path, shape: ImageShape):
        pixels, of_images = _read_idx(flag, images, _IMAGES_MAGIC)
        numbers, of_labels = _read_idx(flag, labels, _LABELS_MAGIC)
        if len(pixels) != len(numbers) or not len(pixels):
            raise DataError(f"{flag} = {images} {labels}: {len(pixels)} images and {len(numbers)} labels; name the two "
                            "files that belong together")
        if (1, *pixels.shape[1:]) != (shape.channels, shape.height, shape.width):
            raise DataError(f"{flag} = {images}: grey images of {pixels.shape[1]} x {pixels.shape[2]} pixels, but the "
                            f"model reads {shape.height} x {shape.width} with {shape.channels} channels; use --img-h "
                            f"{pixels.shape[1]} --img-w {pixels.shape[2]} --num-channels 1")
        self._pixels, self.labels = pixels, numbers.astype(np.int64)
        self.digest = hashlib.sha256(f"idx {of_images} {of_labels}".encode()).hexdigest()

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Shapes: [c, H, W]"""
        return self._pixels[index][None]


class FolderImages:
    """A folder for each class, in order of name; images are read when they are needed, scaled to cover the model's
    size, and cut to it around their middle."""

    def __init__(self, flag: str, folder: Path, shape: ImageShape, class_names: Sequence[str] | None):
        if not folder.is_dir():
            raise DataError(f"{flag} = {folder}: no such folder; name a folder with a folder of images for each class, "
                            "or an idx file of images and one of labels")
        self._pillow = _pillow(flag)
        if shape.channels not in _MODES:
            raise DataError(f"{flag} = {folder}: image files have {', '.join(map(str, _MODES))} channels, not "
                            f"--num-channels = {shape.channels}; choose one of them")
        self.shape = shape
        here = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.class_names = list(class_names if class_names is not None else here)
        if unknown := sorted(set(here) - set(self.class_names)):
            raise DataError(f"{flag} = {folder}: class {unknown[0]} is not among the classes of the training set "
                            f"({', '.join(self.class_names[:5])}, ...); remove that folder, or add it there")
        self._paths: list[Path] = []
        labels = []
        for name in here:
            files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
            self._paths += files
            labels += [self.class_names.index(name)] * len(files)
        if not self._paths:
            raise DataError(f"{flag} = {folder}: it holds no images ({', '.join(SUFFIXES)}) in a folder for each class")
        self.labels = np.array(labels, dtype=np.int64)
        listing = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in self._paths)
        self.digest = hashlib.sha256(f"folder {shape} {self.class_names} {listing}".encode()).hexdigest()

    def pixels(self, index: int) -> NDArray[np.uint8]:
        path = self._paths[index]
        height, width = self.shape.height, self.shape.width
        try:
            with self._pillow.open(path) as image:
                if image.mode.startswith(("I", "F")):  # all above 255 would become white, and fractions black
                    raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
                image = image.convert(_MODES[self.shape.channels])
                scale = max(height / image.height, width / image.width)
                size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
                if size != image.size:
                    image = image.resize(size, self._pillow.Resampling.BICUBIC)
                left, top = (size[0] - width) // 2, (size[1] - height) // 2
                array = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)
        except (OSError, ValueError, SyntaxError, self._pillow.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}. Replace or remove it.") from error
        return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


LabelledImages = IdxImages | FolderImages


def _pillow(flag: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{flag}: folders of images need Pillow; pip install 'megatron_ltd[vision]', or use idx "
                        "files") from error
    return Image


def _read_idx(flag: str, path: Path, magic: int) -> tuple[NDArray[np.uint8], str]:
    """The array of an idx file, and the SHA-256 of its content."""
    kind = "images" if magic == _IMAGES_MAGIC else "labels"
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{flag} = {path}: it cannot be read: {error}") from error
    dimensions = magic & 0xFF
    head = 4 + 4 * dimensions
    if len(data) < head or int.from_bytes(data[:4], "big") != magic:
        raise DataError(f"{flag} = {path}: no idx file of {kind}, which begins with {magic:#010x}; name the images "
                        "first and the labels after them")
    sizes = [int.from_bytes(data[4 * i:4 * i + 4], "big") for i in range(1, dimensions + 1)]
    values = np.frombuffer(data, dtype=np.uint8, offset=head)
    if len(values) != int(np.prod(sizes, dtype=object)):
        raise DataError(f"{flag} = {path}: {len(values)} bytes after a header that announces {sizes}; the file is "
                        "damaged, copy it again")
    return values.reshape(sizes), hashlib.sha256(data).hexdigest()
