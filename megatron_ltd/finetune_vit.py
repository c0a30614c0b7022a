"""Finetune ViT, or train one from scratch: `torchrun ... -m megatron_ltd.finetune_vit --train-data-path ...`."""

import sys

from megatron_ltd.data.vision.images import image_epoch
from megatron_ltd.train import finetune


def main(arguments: list[str] | None = None) -> int:
    """Run and return the exit code.

    Args:
        arguments: the command line's without the program's name; None takes this process's.
    """
    return finetune.main(arguments, "vit", image_epoch)


if __name__ == "__main__":
    sys.exit(main())
