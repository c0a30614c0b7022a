"""Finetune GPT: `torchrun ... -m megatron_ltd.finetune_gpt --pretrained-checkpoint ... --train-jsonl ...`."""

from megatron_ltd.lm_eval.run_tasks import plan_tasks
from megatron_ltd.train.process.recipe import Recipe

RECIPE = Recipe("gpt", finetuning=True, plan_tasks=plan_tasks)
main = RECIPE.main


if __name__ == "__main__":
    RECIPE.run()
