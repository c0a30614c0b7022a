"""A whole run on a GPU, from flags to the metrics file and a checkpoint."""

import json
import math
import subprocess
import sys
from pathlib import Path

from tests.gpu.conftest import DEVICE

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_in_bf16_with_dropped_tokens_trains_and_saves(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ltd.pretrain_gpt", "--num-layers", "4", "--hidden-size", "128",
         "--num-attention-heads", "4", "--seq-length", "128", "--vocab-size", "64", "--mock-data", "--bf16",
         "--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "6", "--lr", "1e-3",
         "--lr-decay-style", "constant", "--random-ltd", "--random-ltd-start-length", "32", "--random-ltd-steps", "4",
         "--random-ltd-length-step", "32", "--log-interval", "1", "--eval-iters", "1", "--eval-interval", "3",
         "--save", str(tmp_path / "checkpoints"), "--metrics-file", str(metrics)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"1 processes on {DEVICE}" in done.stdout
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "lm_loss" in line]
    assert [line["kept_length"] for line in steps] == [32, 32, 64, 96, 128, 128]
    # Tokens are uniform over 63 values: no model does better, and an untrained one not much worse.
    assert all(abs(line["lm_loss"] - math.log(63)) < 0.3 for line in steps)
    assert all(math.isfinite(line["validation_loss"]) for line in lines if "validation_loss" in line)
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
