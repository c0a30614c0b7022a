"""The corpus and the earlier run that tests of training share."""

import shutil
from pathlib import Path

import pytest

from tests.train.refusals import RUN
from tests.train.runs import Corpus, SentenceCorpus, run, write_corpus, write_sentence_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def sentence_corpus(tmp_path_factory: pytest.TempPathFactory) -> SentenceCorpus:
    return write_sentence_corpus(tmp_path_factory.mktemp("sentences"))


@pytest.fixture(scope="session")
def earlier_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("earlier")
    run(folder, {**RUN, **corpus.settings, "save": str(folder / "checkpoints"), "exit_interval": 2}, code=11)
    (folder / "checkpoints" / "exit.json").unlink()
    return folder


@pytest.fixture
def folder(earlier_run: Path, tmp_path: Path) -> Path:
    """A copy of it that the bad command could do harm to."""
    shutil.copytree(earlier_run, tmp_path / "run")
    return tmp_path / "run"
