"""Pretrain BERT: `torchrun ... -m megatron_ltd.pretrain_bert --num-layers ... --data-path ..._sentence`."""

from megatron_ltd.train.process.recipe import Recipe

RECIPE = Recipe("bert")
main = RECIPE.main


if __name__ == "__main__":
    RECIPE.run()
