"""Finetune ViT, or train one from scratch: `torchrun ... -m megatron_ltd.finetune_vit --train-data-path ...`."""

from megatron_ltd.train.process.recipe import Recipe

RECIPE = Recipe("vit", finetuning=True)
main = RECIPE.main


if __name__ == "__main__":
    RECIPE.run()
