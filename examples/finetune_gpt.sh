#!/usr/bin/env bash
# Finetune a GPT or Llama on one or more nodes, on GPUs or, without GPUs, on CPU processes.
#
#     python tools/convert_checkpoint.py --from-hf gpt2 --output checkpoints/gpt2      # or one of ours
#     bash examples/finetune_gpt.sh --pretrained-checkpoint checkpoints/gpt2 --use-checkpoint-args \
#         --seq-length 1024 --train-jsonl train.jsonl --valid-jsonl valid.jsonl \
#         --train-epochs 3 --early-stopping-patience 2 \
#         --micro-batch-size 4 --global-batch-size 32 --lr 1e-5 --lr-warmup-fraction 0.03 --random-ltd \
#         --save checkpoints/tuned --load checkpoints/tuned
#
# Rerun the same command to resume; checkpoints/tuned/best holds the weights with the lowest validation loss.
# A line of the files is {"prompt": "...", "response": "..."} or {"messages": [...]}. Instead of them, --data-path reads a
# corpus of plain text.
#
# All arguments go to megatron_ltd.finetune_gpt, where they override CONFIG. The environment and the exit codes are
# those of examples/pretrain_gpt.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" finetune_gpt "$@"
