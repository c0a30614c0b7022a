"""--eval-tasks: the scores of a run are those of its checkpoints, on any layout, and training does not notice them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.data.text.tokenizer import hugging_face_tokenizer
from megatron_ltd.lm_eval.results import EvalOptions
from megatron_ltd.lm_eval.scorer import build_scorer
from megatron_ltd.lm_eval.tasks.names import TASKS
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tests.train.refusals import CONFIG, DATA, assert_clear, refused_in_this_process
from tests.train.runs import TINY, Corpus, Run, curve, documents, launched, run
from tests.train.test_equivalence import SP2, ZERO_3

STEPS = 4
SETTINGS: dict[str, Any] = {**TINY, "train_iters": STEPS, "random_ltd_steps": 3, "eval_interval": STEPS}
SLICED: dict[str, Any] = {**SP2, **ZERO_3}
"""On four processes: rows in equal slices, and parameters that all gather together."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Passages and questions of several lengths, some longer than the model; and a file that no task can read."""
    folder = tmp_path_factory.mktemp("tasks")
    words = " ".join(documents()[:3]).split()
    passages = [" ".join(words[start:start + 3 + start % 11]) for start in range(0, 330, 30)]
    (folder / "lambada_test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    questions = [{"premise": f"{text}.", "choice1": "It is.", "choice2": "It was so.", "question": "cause", "label": 0}
                 for text in passages[:5]]
    (folder / "val.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (folder / "bad.jsonl").write_text('{"sentence": 3}\n')
    return folder


def scored(corpus: Corpus, tasks: Path, **settings: Any) -> dict[str, Any]:
    return {**SETTINGS, **corpus.settings, "eval_tasks": f"lambada,winogrande={tasks / 'bad.jsonl'},copa",
            "eval_tasks_interval": 2, "task_data": str(tasks), **settings}


def scores(found: Run) -> list[dict[str, Any]]:
    return [line for line in found.lines if "eval/lambada/accuracy" in line]


@pytest.fixture(scope="module")
def alone(corpus: Corpus, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run on one process that scores, and the folder with its checkpoints."""
    folder = tmp_path_factory.mktemp("alone")
    return run(folder, scored(corpus, tasks, save=str(folder / "saved"), save_interval=2)), folder / "saved"


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (4, SLICED)])
def test_training_does_not_notice_and_every_layout_gives_the_same_scores(
    alone: tuple[Run, Path], corpus: Corpus, tasks: Path, tmp_path: Path, ranks: int, layout: dict[str, Any],
) -> None:
    (tmp_path / "plain").mkdir()
    plain = run(tmp_path / "plain", {**SETTINGS, **corpus.settings, **layout}, ranks)
    found = alone[0] if ranks == 1 else run(tmp_path, scored(corpus, tasks, **layout), ranks)
    assert curve([line for line in found.lines if line not in scores(found)]) == curve(plain.lines)
    assert [line["step"] for line in scores(found)] == [2, 4]
    for line, truth in zip(scores(found), scores(alone[0]), strict=True):
        assert line == pytest.approx(truth, rel=1e-4, abs=1e-7)


def test_the_scores_are_those_of_the_checkpoint(alone: tuple[Run, Path], corpus: Corpus, tasks: Path) -> None:
    found, saved = alone
    for line in scores(found):
        with launched(Launch()):
            scorer = build_scorer(str(saved), step=line["step"], tensor_parallel=1, pipeline_parallel=1,
                                  micro_batch_size=1)
        tokenizer = hugging_face_tokenizer(corpus.tokenizer)
        for name, file in (("lambada", "lambada_test.jsonl"), ("copa", "val.jsonl")):
            result = TASKS[name].evaluate(tasks / file, scorer, tokenizer, EvalOptions())
            for metric, wanted in result.metrics.items():
                assert line[f"eval/{name}/{metric}"] == pytest.approx(wanted.value, rel=1e-5)
                assert line[f"eval/{name}/{metric}_stderr"] == pytest.approx(wanted.stderr, rel=1e-5)
        launch.stop()


def test_a_task_that_fails_is_told_and_the_others_are_scored(alone: tuple[Run, Path]) -> None:
    found, _ = alone
    assert [line["eval/winogrande/failed"] for line in scores(found)] == [1, 1]
    [ending] = found.endings
    assert "task winogrande failed at iteration 2, and the run goes on: DataError" in ending.said
    assert "bad.jsonl:1" in ending.said


@pytest.mark.parametrize(("change", "code", "said"), [
    ({"eval_tasks": "lambada,hellaswagg"}, CONFIG, ["--eval-tasks = 'lambada,hellaswagg'", "no task 'hellaswagg'"]),
    ({"eval_tasks": "lambada,piqa,sciq"}, DATA, ["no file for task piqa", "no file for task sciq"]),
    ({"eval_tasks": "lambada", "task_data": None}, CONFIG, ["--task-data"]),
    ({"eval_tasks_interval": 0}, CONFIG, ["--eval-tasks-interval = 0", "at least 1"]),
    ({"mock_data": True, "data_path": None, "tokenizer_type": None, "tokenizer_model": None, "vocab_size": 64}, CONFIG,
     ["--eval-tasks", "without a tokenizer of texts"]),
])
def test_what_cannot_be_scored_is_told_before_training(
    corpus: Corpus, tasks: Path, change: dict[str, Any], code: int, said: list[str],
) -> None:
    ending = refused_in_this_process(scored(corpus, tasks, **change))
    assert ending.code == code, ending.said
    assert_clear(ending.said, said)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_other_names_are_tasks_of_the_harness(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "boolq").mkdir()
    docs = [{"passage": f"It is {word}.", "question": "is it", "label": 1, "idx": 0} for word in "abc"]
    (tmp_path / "boolq" / "validation.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "boolq" / "dev.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "boolq-seq2seq").symlink_to(tmp_path / "boolq")
    plain = run(tmp_path, {**SETTINGS, **corpus.settings, **SP2}, 2)
    found = run(tmp_path, {**SETTINGS, **corpus.settings, **SP2, "eval_tasks": "boolq,boolq-seq2seq",
                           "eval_tasks_limit": 2, "task_data": str(tmp_path)}, 2)
    missing = refused_in_this_process({**SETTINGS, **corpus.settings, "eval_tasks": "pubmedqa,boolq-seq2seq",
                                       "task_data": str(tmp_path)})
    assert missing.code == DATA and "pubmedqa: lm-evaluation-harness cannot load it" in missing.said
    *curve_lines, last = found.lines
    assert curve(curve_lines) == curve(plain.lines)
    assert last["step"] == STEPS and {"eval/boolq/acc", "eval/boolq-seq2seq/exact_match"} <= last.keys()
