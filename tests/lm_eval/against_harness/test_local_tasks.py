"""Tasks of lm-evaluation-harness on the files at hand, some of which are missing or wrong."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.lm_eval.harness.tasks import plan_harness
from megatron_ltd.lm_eval.results import EvalOptions, TaskResult
from tests.lm_eval.fakes import UniformScorer, WordTokenizer

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

CB = {"premise": "It rains.", "hypothesis": "It is wet."}
DOCS: dict[str, tuple[str, dict[str, Any]]] = {
    "social_iqa": ("validation", {"context": "Ann ran.", "question": "Why?", "answerA": "bus", "answerB": "rain",
                                  "answerC": "fun", "label": "1"}),
    "commonsense_qa": ("validation", {"question": "Where?", "answerKey": "A",
                                      "choices": {"label": list("ABCDE"), "text": ["a", "b", "c", "d", "e"]}}),
    "cb": ("validation", CB | {"label": 0}),
    "wsc": ("validation", {"text": "Mark told Pete lies about himself .", "span1_index": 0, "span1_text": "Mark",
                           "span2_index": 5, "span2_text": "himself", "label": 0}),
    "pubmedqa": ("test", {"CONTEXTS": ["One.", "Two."], "QUESTION": "Is it?", "final_decision": "yes"}),
}


def put(folder: Path, task: str, split: str, docs: list[dict[str, Any]]) -> None:
    (folder / task).mkdir(exist_ok=True)
    (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))


def score(folder: Path, listed: str, num_fewshot: int | None = None) -> dict[str, TaskResult | str]:
    """The result of each task, or why it failed."""
    found: dict[str, TaskResult | str] = {}
    for run in plan_harness(listed.split(","), folder, num_fewshot):
        try:
            if run.problem is not None:
                raise run.problem
            found |= run.evaluate(UniformScorer(), WordTokenizer(), EvalOptions())
        except DataError as error:
            found[run.name] = str(error)
    return found


def test_only_the_split_that_is_scored_has_to_be_there(tmp_path: Path) -> None:
    for task, (split, doc) in DOCS.items():
        put(tmp_path, task, split, [doc] * 3)
    found = score(tmp_path, ",".join(DOCS))
    # All choices are equally probable up to their lengths; each right answer is the first choice.
    assert {name: (result.n, result.metrics["acc"].value) for name, result in found.items()
            if isinstance(result, TaskResult)} == dict.fromkeys(DOCS, (3, 1.0))


def test_what_is_missing_is_named_with_its_path_and_other_tasks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    split, doc = DOCS["pubmedqa"]
    put(tmp_path, "pubmedqa", "validation", [doc])
    put(tmp_path, "social_iqa", "validation", [DOCS["social_iqa"][1]] * 2)
    (tmp_path / "wsc").mkdir()
    (tmp_path / "wsc" / "validation.jsonl").write_text('{"text": "half a li')
    found = score(tmp_path, "pubmedqa,wsc,piqa,social_iqa")
    assert f"the split 'test' is needed and is not there: looked for {tmp_path}/pubmedqa/test.jsonl" in str(
        found["pubmedqa"])
    assert f"{tmp_path}/wsc/validation.jsonl:1 is not JSON" in str(found["wsc"])
    assert f"Looked for {tmp_path}/piqa/SPLIT.jsonl" in str(found["piqa"])
    assert isinstance(found["social_iqa"], TaskResult)
    few = score(tmp_path, "social_iqa", num_fewshot=1)
    assert f"looked for {tmp_path}/social_iqa/train.jsonl" in str(few["social_iqa"])
    assert "none with --num-fewshot 0" in str(few["social_iqa"])


def test_files_as_others_name_and_write_them_are_read(tmp_path: Path) -> None:
    lines = {task: [json.dumps(doc | {"idx": i}) for i in range(3)] for task, (_, doc) in DOCS.items()}
    shards = tmp_path / "social_iqa" / "data"
    shards.mkdir(parents=True)
    for i, line in enumerate(lines["social_iqa"]):
        table = {name: [value] for name, value in json.loads(line).items()}
        parquet.write_table(pyarrow.table(table), shards / f"validation-0000{i}-of-00003.parquet")
    files = {"cb/cb_val.csv": "premise,hypothesis,label\r\n" + "It rains.,It is wet.,0\r\n" * 3,
             "pubmedqa/test.json": f"\ufeff[{','.join(lines['pubmedqa'])}]",
             "wsc/dev.jsonl": "\ufeff" + "\r\n".join(lines["wsc"])}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "commonsense_qa").mkdir()
    (tmp_path / "commonsense_qa" / "validation.jsonl.gz").write_bytes(
        gzip.compress("\n".join(lines["commonsense_qa"]).encode()))
    found = score(tmp_path, ",".join(DOCS))
    assert {name: (result.n, result.metrics["acc"].value) for name, result in found.items()
            if isinstance(result, TaskResult)} == dict.fromkeys(DOCS, (3, 1.0)), found
    told = [found[name].notes for name in ("social_iqa", "cb", "wsc") if isinstance(found[name], TaskResult)]
    assert told == [(), ("cb: cb_val.csv was read as the split 'validation'",),
                    ("wsc: dev.jsonl was read as the split 'validation'",)]
    [named] = score(tmp_path, f"pubmedqa={tmp_path / 'pubmedqa' / 'test.json'}").values()
    assert named == found["pubmedqa"]
    assert "there is no such file" in str(score(tmp_path, f"cb={tmp_path / 'none.jsonl'}")["cb"])


def test_groups_and_tags_read_the_files_of_their_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    asked = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 0}
    for task in ("wmdp_bio", "wmdp_chem"):
        put(tmp_path, task, "test", [asked] * 2)
    assert f"Looked for {tmp_path}/TASK/test.jsonl" in str(score(tmp_path, "wmdp")["wmdp"]).replace("SPLIT", "test")
    put(tmp_path, "wmdp_cyber", "test", [asked] * 4)
    science = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    for task in ("arc_easy", "arc_challenge"):
        put(tmp_path, task, "test", [science] * 2)
    found = score(tmp_path, "wmdp,ai2_arc")
    assert {name: result.n for name, result in found.items() if isinstance(result, TaskResult)} == {
        "wmdp": 8, "wmdp_bio": 2, "wmdp_chem": 2, "wmdp_cyber": 4, "arc_easy": 2, "arc_challenge": 2}, found
    assert len({run.sha256 for run in plan_harness(["wmdp", "wmdp_bio", "ai2_arc"], tmp_path, None)} - {""}) == 3


def test_labels_that_cannot_be_right_are_no_score_of_zero(tmp_path: Path) -> None:
    put(tmp_path, "cb", "validation", [CB | {"label": "entailment"}] * 2)
    split, doc = DOCS["pubmedqa"]
    put(tmp_path, "pubmedqa", split, [doc] * 2 + [doc | {"final_decision": "perhaps"}])
    put(tmp_path, "wsc", "validation", [DOCS["wsc"][1] | {"label": 0.0}] * 2)
    put(tmp_path, "social_iqa", "validation", [{"text": "It rains."}])
    found = score(tmp_path, "cb,pubmedqa,wsc,social_iqa")
    assert f"{tmp_path}/social_iqa/validation.jsonl has the columns text." in str(found["social_iqa"])
    assert "no example has a right answer among its choices: cb, " in str(found["cb"])
    assert f"wsc, {tmp_path}/wsc/validation.jsonl, example 0 (the first is 0) has the answer 0.0, of type float" in str(
        found["wsc"])
    result = found["pubmedqa"]
    assert isinstance(result, TaskResult) and result.metrics["acc"].value == pytest.approx(2 / 3)
    assert len(result.notes) == 1 and "1 of 3 examples have no right answer" in result.notes[0]


def test_each_task_counts_its_own_examples_that_are_too_long(tmp_path: Path) -> None:
    split, doc = DOCS["social_iqa"]
    put(tmp_path, "social_iqa", split, [doc, doc | {"context": "word " * 1200}])
    put(tmp_path, "pubmedqa", "test", [DOCS["pubmedqa"][1]])
    found = score(tmp_path, "social_iqa,pubmedqa")
    assert {name: result.truncated for name, result in found.items() if isinstance(result, TaskResult)} == {
        "social_iqa": 1, "pubmedqa": 0}


def test_a_task_that_the_harness_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task .social_iqqa."):
        plan_harness(["social_iqqa"], tmp_path, None)
