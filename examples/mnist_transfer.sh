#!/usr/bin/env bash
# Train a small ViT on the digits 0 to 4 and finetune it on 5 to 9, without and with token dropping, on one CPU process.
#
#     bash examples/mnist_transfer.sh t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz build/mnist
#
# Takes about twelve minutes on an idle core for the 10,000 images of MNIST's test set; every tenth is held out. The
# expected results are in docs/finetuning.md; PYTHON is the interpreter (default: python).
set -euo pipefail

images=${1:?"give MNIST's file of images, its file of labels, and a folder for the results"}
labels=${2:?"give the file of labels"}
out=${3:?"give a folder for the results"}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}

mkdir -p "$out"
"$PYTHON" "$here/split_mnist.py" --images "$images" --labels "$labels" --classes 0 1 2 3 4 --output "$out/low"
"$PYTHON" "$here/split_mnist.py" --images "$images" --labels "$labels" --classes 5 6 7 8 9 --output "$out/high"

train() {  # task, name of the run, further flags
    local task=$1 name=$2
    shift 2
    GPUS_PER_NODE=1 bash "$here/finetune_vit.sh" --distributed-backend gloo \
        --num-layers 6 --hidden-size 64 --num-attention-heads 4 --init-method-std 0.1 \
        --img-h 28 --img-w 28 --patch-dim 4 --num-channels 1 --num-classes 5 --image-augmentation crop \
        --train-data-path "$out/$task-train-images.idx" "$out/$task-train-labels.idx" \
        --valid-data-path "$out/$task-valid-images.idx" "$out/$task-valid-labels.idx" \
        --micro-batch-size 32 --global-batch-size 32 --lr 1e-3 --lr-decay-style cosine --lr-warmup-fraction 0.1 \
        --weight-decay 0.05 --log-interval 50 --seed 1 --save "$out/$name" --metrics-file "$out/$name.jsonl" "$@"
}

train low pretrained --train-epochs 10
train high dense --load "$out/pretrained/best" --finetune --train-epochs 10
train high dropping --load "$out/pretrained/best" --finetune --train-epochs 10 \
    --random-ltd --random-ltd-length-step 2
train high dropping-long --load "$out/pretrained/best" --finetune --train-epochs 10 \
    --random-ltd --random-ltd-start-length 8 --random-ltd-length-step 2 --random-ltd-steps 1000
for name in dense dropping dropping-long; do
    echo "$name: $(grep top1 "$out/$name.jsonl" | tail -n 1)"
done
