"""Files that an earlier version wrote (commit 1eda3bb): its checkpoint is continued, on its corpus, to the curve that
it found itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import curve, read_lines, run

BEFORE = Path(__file__).resolve().parents[1] / "fixtures" / "before"
SETTINGS: dict[str, Any] = {
    "split": "90,10,0", "tokenizer_type": "NullTokenizer", "vocab_size": 59, "num_layers": 4, "hidden_size": 16,
    "num_attention_heads": 2, "seq_length": 32, "position_embedding_type": "rope", "make_vocab_size_divisible_by": 8,
    "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 8, "lr": 1e-2, "lr_warmup_iters": 2,
    "log_interval": 1, "eval_interval": 4, "eval_iters": 2, "save_interval": 4, "seed": 7,
    "random_ltd": True, "random_ltd_start_length": 8, "random_ltd_length_step": 4}
ARMS: dict[str, dict[str, Any]] = {
    "random-ltd": {"random_ltd_steps": 7},
    "both": {"random_ltd_steps": 8, "layer_drop_rate": 0.4, "seq_length_curriculum_start_length": 8,
             "seq_length_curriculum_steps": 7, "seq_length_curriculum_length_step": 8}}


@pytest.mark.parametrize("arm", ARMS)
def test_a_checkpoint_of_an_earlier_version_continues_to_the_curve_of_that_version(arm: str, tmp_path: Path) -> None:
    shutil.copytree(BEFORE, tmp_path / "before")
    folder = tmp_path / "before" / arm
    found = run(tmp_path, {**SETTINGS, **ARMS[arm], "data_path": (str(tmp_path / "before" / "corpus"),),
                           "save": str(folder), "load": str(folder)})
    wanted = [line for line in curve(read_lines(BEFORE / f"{arm}.jsonl")) if line["step"] > 4]
    assert len(wanted) == 5  # four steps and a validation
    for line, before in zip(curve(found.lines), wanted, strict=True):
        assert set(before) <= set(line), "a field of the metrics file is a contract"
        for name, value in before.items():
            # To the last bits on one type of processor; others round elsewhere.
            assert line[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
