"""A command that is refused: by which exit code, with which words, and that it does no harm."""

import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_ltd.model.stack import Stack
from tests.train.runs import TINY, Corpus, Ending, Settings, pretrain

CONFIG, DATA, CHECKPOINT, PEER_LOST = 20, 21, 22, 40

RUN = {**TINY, "train_iters": 4, "random_ltd_steps": 3, "eval_interval": 4}


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the record of how the last command ended."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "exit.json"}


def settings_in(corpus: Corpus, folder: Path, **settings: Any) -> dict[str, Any]:
    """The earlier run, continued."""
    return {**RUN, **corpus.settings, "save": str(folder / "checkpoints"), "load": str(folder / "checkpoints"),
            "metrics_file": str(folder / "metrics.jsonl"), **settings}


def assert_clear(said: str, fragments: list[str]) -> None:
    missing = [fragment for fragment in fragments if fragment not in said]
    assert not missing, f"{missing} not in:\n{said}"
    assert "Traceback" not in said and "internal error" not in said, said


def refused_in_this_process(settings: Settings) -> Ending:
    """A run on one process that may not take a step."""
    with mock.patch.object(Stack, "forward", side_effect=AssertionError("a step was taken")):
        return pretrain(0, 1, "", settings)
