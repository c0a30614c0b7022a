"""Finetune ViT, or train one from scratch: `torchrun ... -m megatron_ltd.finetune_vit --train-data-path ...`."""

from megatron_ltd.train.process.recipe import Recipe

RECIPE = Recipe("vit", finetuning=True)


def main(arguments: list[str] | None = None) -> int:
    """Run and return the exit code.

    Args:
        arguments: the command line's without the program's name; None takes this process's.
    """
    return RECIPE.main(arguments)


if __name__ == "__main__":
    RECIPE.run()
