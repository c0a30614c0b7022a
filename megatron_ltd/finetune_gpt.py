"""Finetune GPT: `torchrun ... -m megatron_ltd.finetune_gpt --pretrained-checkpoint ... --train-jsonl ...`."""

import sys

from megatron_ltd.data.finetuning.build import text_epoch
from megatron_ltd.train import finetune


def main(arguments: list[str] | None = None) -> int:
    """Run and return the exit code.

    Args:
        arguments: the command line's without the program's name; None takes this process's.
    """
    return finetune.main(arguments, "gpt", text_epoch)


if __name__ == "__main__":
    sys.exit(main())
