"""Several validation sets: a loss each, on all of each set, however they are named and wherever they are computed."""

from pathlib import Path

import pytest

from tests.train.runs import TINY, Corpus, pretrain, read_lines, run

SPLIT = {"train_iters": 1, "lr_warmup_iters": 0, "eval_iters": 0, "full_validation": True, "random_ltd_steps": 1}


def test_each_set_is_scored_whole_and_the_validation_loss_is_their_mean(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    common = {**TINY, **SPLIT, **corpus.settings, "data_path": None, "split": None,
              "train_data_path": (f"{corpus.prefix}@0:0.9",)}
    parts = [f"{corpus.prefix}@{part}" for part in ("0.9:0.93", "0.93:1")]
    path = tmp_path / "here.jsonl"
    assert pretrain(0, 1, "", {**common, "valid_data_path": tuple(map("{}={}".format, ("a", "b"), parts)),
                               "metrics_file": str(path)}).code == 0
    said = capsys.readouterr().out
    assert " validation-a loss at iteration 1 | lm loss value:" in said and "validation-b " in said
    found = {name: value for line in read_lines(path) for name, value in line.items() if name.startswith("valid")}
    assert found["validation_loss"] == pytest.approx((found["validation-a_loss"] + found["validation-b_loss"]) / 2)
    assert found["validation-a_loss"] != pytest.approx(found["validation-b_loss"], rel=1e-4)
    elsewhere = run(tmp_path, {**common, "valid_data_path": tuple(parts), "multiple_validation_sets": True,
                               "validation_set_names": ("a", "b"), "micro_batch_size": 1}, 2)
    for name, value in found.items():
        assert elsewhere.column(name) == [pytest.approx(value, rel=1e-5)], name
