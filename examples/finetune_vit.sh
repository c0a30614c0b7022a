#!/usr/bin/env bash
# Finetune a ViT, or train one from scratch, on one or more nodes, on GPUs or, without GPUs, on CPU processes.
#
#     python tools/convert_checkpoint.py --from-hf vit-base-patch16-224 --output checkpoints/vit     # or one of ours
#     bash examples/finetune_vit.sh --pretrained-checkpoint checkpoints/vit --use-checkpoint-args \
#         --train-data-path imagenet/train --valid-data-path imagenet/val --num-classes 1000 \
#         --image-augmentation crop-flip --train-epochs 14 --full-validation \
#         --micro-batch-size 64 --global-batch-size 512 --lr 3e-5 --lr-decay-style cosine --bf16 \
#         --random-ltd --random-ltd-start-length 32 --random-ltd-length-step 8 --random-ltd-steps 28000 \
#         --save checkpoints/tuned --load checkpoints/tuned
#
# A training set is a folder with one subfolder of images per class (needs Pillow), or an idx file of images and one of
# labels, like MNIST's. Without a checkpoint specify the model: --num-layers, --hidden-size, --num-attention-heads,
# --patch-dim, --img-h, --img-w, --num-channels. With a checkpoint, the positions are interpolated for another
# resolution, and the classifier is reinitialised for another number of classes.
#
# All arguments go to megatron_ltd.finetune_vit, where they override CONFIG. The environment and the exit codes are
# those of examples/pretrain_gpt.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" finetune_vit "$@"
