"""A run that copies its checkpoints to a store, and the same command on a machine that has lost its own."""

from pathlib import Path

import pytest

from tests.train.refusals import RUN
from tests.train.runs import Corpus, run


def test_one_command_starts_a_run_and_resumes_it_from_the_store_alone(corpus: Corpus, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'store'}"
    truth = run(tmp_path, {**RUN, **corpus.settings}).steps
    lines = []
    for machine, world_size, stop in (("one", 2, 2), ("other", 1, None)):
        folder = tmp_path / machine
        folder.mkdir()
        settings = {**RUN, **corpus.settings, "save": str(folder / "checkpoints"), "upload": url, "load": url,
                    "upload_retain": 1, "exit_interval": stop}
        lines += run(folder, settings, world_size, code=11 if stop else 0).steps
    assert [line["step"] for line in lines] == [line["step"] for line in truth]
    for line, wanted in zip(lines, truth, strict=True):
        assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], rel=1e-5, abs=0.0)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "iter_0000004", "latest_checkpointed_iteration.txt"]
