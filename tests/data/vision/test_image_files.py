from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ltd.data.vision.image_files import ImageShape, read_images
from megatron_ltd.errors import DataError


@pytest.mark.parametrize("pixels", [
    np.array([[0, 257], [40000, 65535]], dtype=np.uint16), np.array([[0, 257], [40000, 65535]], dtype=np.int32),
    np.array([[0.0, 0.2], [0.5, 1.0]], dtype=np.float32),
], ids=["16-bits", "32-bits", "fractions"])
def test_an_image_of_more_than_8_bits_is_refused_rather_than_cut_off_at_255(
    tmp_path: Path, pixels: np.ndarray,
) -> None:
    path = tmp_path / "class" / ("a.png" if pixels.dtype == np.uint16 else "a.tiff")
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    images = read_images("--train-data-path", [str(tmp_path)], ImageShape(1, 2, 2), 1)
    with pytest.raises(DataError, match=r"class/a\..*more than 8 bits.*convert it to 8 bits"):
        images.pixels(0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_pixels_of_an_image_are_those_that_pillow_shows(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "class" / "a.tiff"
    path.parent.mkdir()
    Image.fromarray(np.arange(0, 240, 20, dtype=np.uint8).reshape(2, 2, 3)).convert(mode).save(path)
    images = read_images("--train-data-path", [str(tmp_path)], ImageShape(3, 2, 2), 1)
    with Image.open(path) as shown:
        assert images.pixels(0).tolist() == np.asarray(shown.convert("RGB")).transpose(2, 0, 1).tolist()
