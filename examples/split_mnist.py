"""Splits MNIST's idx files into tasks of some classes each, numbered from 0, with every tenth image held out.

    python examples/split_mnist.py --images t10k-images-idx3-ubyte.gz --labels t10k-labels-idx1-ubyte.gz \
        --classes 0 1 2 3 4 --output build/mnist/low

writes low-train-images.idx, low-train-labels.idx, low-valid-images.idx and low-valid-labels.idx.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.data.vision.image_files import IdxImages, ImageShape
from megatron_ltd.errors import UserError
from megatron_ltd.log import Console

HELD_OUT_EVERY = 10
PIXELS = 28


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """The idx format: two zero bytes, 8 for bytes, the number of dimensions, big-endian sizes, values."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(head + values.tobytes())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--images", required=True, metavar="FILE")
    parser.add_argument("--labels", required=True, metavar="FILE")
    parser.add_argument("--classes", required=True, type=int, nargs="+", metavar="N")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    args = parser.parse_args(argv)
    try:
        digits = IdxImages("--images", Path(args.images), Path(args.labels), ImageShape(1, PIXELS, PIXELS))
    except UserError as error:
        Console().error(f"{type(error).__name__}: {error}")
        return error.exit_code
    chosen = np.flatnonzero(np.isin(digits.labels, args.classes))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    held_out = np.arange(len(chosen)) % HELD_OUT_EVERY == 0
    for name, part in (("train", chosen[~held_out]), ("valid", chosen[held_out])):
        numbers = np.array([args.classes.index(label) for label in digits.labels[part].tolist()], dtype=np.uint8)
        write_idx(Path(f"{args.output}-{name}-images.idx"), np.concatenate([digits.pixels(i) for i in part.tolist()]))
        write_idx(Path(f"{args.output}-{name}-labels.idx"), numbers)
        print(f"{args.output}-{name}: {len(part)} images of {len(args.classes)} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
