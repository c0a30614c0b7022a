"""Two runs on one host do not save in one folder."""

import json
from pathlib import Path

import pytest

from megatron_ltd.train.process.sole import alone_in
from tests.train.refusals import CHECKPOINT, assert_clear, contents, refused_in_this_process, settings_in
from tests.train.runs import Corpus


def test_a_second_run_in_the_folder_is_refused_and_leaves_the_first_one_s_files_alone(
    corpus: Corpus, tmp_path: Path,
) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "lm_loss": 5.0}) + "\n")
    before = contents(tmp_path)
    with alone_in(str(checkpoints), 1.0):
        ending = refused_in_this_process(settings_in(corpus, tmp_path, distributed_timeout_minutes=0.01))
    assert ending.code == CHECKPOINT
    assert_clear(ending.said, [f"--save = {checkpoints} is in use", "another run on this host saves there"])
    assert contents(tmp_path) == before


def test_the_folder_is_free_once_its_run_has_ended(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), alone_in(str(tmp_path), 1.0):
            raise KeyError
    with alone_in(str(tmp_path), 1.0), alone_in(str(tmp_path / "other"), 1.0), alone_in(None, 1.0):
        pass
