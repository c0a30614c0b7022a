"""What a scorer's model goes on with does not depend on the layout."""

from pathlib import Path

import pytest

from tests.checkpoint.hugging_face import read_in, saved
from tests.gloo import launch_ranks
from tests.lm_eval.answering_ranks import answer
from tests.lm_eval.gpt2_scorer import tiny_gpt2


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    assert read_in(saved(tiny_gpt2(positions=96), tmp_path / "source"), tmp_path / "ours") == 0
    return tmp_path / "ours"


@pytest.mark.parametrize(("ranks", "tp", "pp"), [(2, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_answers_do_not_depend_on_the_layout(checkpoints: Path, ranks: int, tp: int, pp: int) -> None:
    texts = [[i + 3, 7, i * 5 + 1][:1 + i % 3] for i in range(8)]
    [alone] = launch_ranks(answer, 1, str(checkpoints), texts, 1, 1, 8)
    assert len({tuple(tokens) for tokens in alone}) > 3
    assert launch_ranks(answer, ranks, str(checkpoints), texts, tp, pp, 3) == [alone] * ranks
