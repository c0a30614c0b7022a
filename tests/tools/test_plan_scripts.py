"""Launch scripts are read, not run."""

from pathlib import Path

import pytest

from megatron_ltd.errors import ConfigError
from tools.planning.scripts import Script, read_script

MEGATRON = """#!/bin/bash
# Runs the "175B" parameter model
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NUM_NODES=16
WORLD_SIZE=$(($GPUS_PER_NODE*$NUM_NODES))
CHECKPOINT_PATH=$1 #<Specify path>
LAYERS=96; echo started
DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
)
MODEL_ARGS=(
    --num-layers 96
    --attention-backend auto # Can use (flash/fused)
)
MODEL_ARGS+=(--bf16)
TRAINING="
    --global-batch-size $((WORLD_SIZE * 12)) \\
    --lr ${LR:-6.0e-5} --split '949,50,1'
"
DATA_ARGS=(--data-path "$DATA" --save $CHECKPOINT_PATH)
torchrun ${DISTRIBUTED_ARGS[@]} megatron/pretrain_gpt.py \\
    ${MODEL_ARGS[@]} \\
    $TRAINING \\
    "${DATA_ARGS[@]}" 2>&1 | tee log.txt
"""


def read(tmp_path: Path, text: str) -> Script:
    (tmp_path / "train.sh").write_text(text)
    return read_script(tmp_path / "train.sh")


def test_variables_arrays_and_sums_stand_for_their_words(tmp_path: Path) -> None:
    assert read(tmp_path, MEGATRON) == Script("pretrain_gpt", [
        "--num-layers", "96", "--attention-backend", "auto", "--bf16", "--global-batch-size", "1536", "--lr", "6.0e-5",
        "--split", "949,50,1", "--data-path", "$DATA", "--save", "$1"], 128)


@pytest.mark.parametrize(("text", "program", "arguments", "processes"), [
    ("# recipe=gpt\n--num-layers\n96\n--lr\n1e-4\n", None, ["--num-layers", "96", "--lr", "1e-4"], None),
    ("torchrun --nproc-per-node=4 -m megatron_ltd.finetune_vit --bf16 > log", "finetune_vit", ["--bf16"], 4),
    ("A=2\nif true; then\n A=3\nfi\ndeepspeed pretrain_bert.py --lr $A &", "pretrain_bert", ["--lr", "3"], None),
    ("N=7\npython pretrain_gpt.py --num-layers $(( N - 2*3 + 8/4 ))", "pretrain_gpt", ["--num-layers", "3"], None),
    ("opts=\" \\\n --bf16 \\\n --lr 1\"\nopts=\"${opts} --seed 2\"\npython pretrain_gpt.py ${opts} \\\n --fp16",
     "pretrain_gpt", ["--bf16", "--lr", "1", "--seed", "2", "--fp16"], None)])
def test_other_ways_to_write_a_command(tmp_path: Path, text: str, program: str | None, arguments: list[str],
                                       processes: int | None) -> None:
    assert read(tmp_path, text) == Script(program, arguments, processes)


def test_what_is_no_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a shell script"):
        read_script(tmp_path / "none.sh")
    with pytest.raises(ConfigError, match="closing quotation"):
        read(tmp_path, "python pretrain_gpt.py --lr '1")
    for text in ("", "python train_t5.py --num-layers 4"):
        with pytest.raises(ConfigError, match="neither starts a program"):
            read(tmp_path, text)
