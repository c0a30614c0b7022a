"""Right answers of classification tasks, of every type that a file can hold."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.harness.answers import check_answers, first_unreadable
from megatron_ltd.lm_eval.harness.local import LocalSplits


def task_of(labels: list[Any], choices: tuple[str, ...] = ("True", "False", "Neither")) -> Any:
    """A task as the harness has it."""
    return SimpleNamespace(
        OUTPUT_TYPE="multiple_choice", task_name="cb", config=SimpleNamespace(
            process_results=None, test_split=None, validation_split="validation"),
        has_test_docs=lambda: False, eval_docs=[{"label": label} for label in labels],
        doc_to_text=lambda doc: f"{doc['premise']}", doc_to_target=lambda doc: doc["label"],
        doc_to_choice=lambda doc: choices)


@pytest.mark.parametrize("labels", [
    [0, 1, 2], [True, False], ["True", "Neither"], [[0, 2], [1]], [0, "Neither"],
])
def test_numbers_and_texts_of_choices_are_answers(labels: list[Any]) -> None:
    assert check_answers(task_of(labels), None, None) == []


@pytest.mark.parametrize("label", [0.0, 1.5, float("nan"), None, {"index": 0}, [0.0], [None], ["True"], [[0]]])
def test_an_answer_of_another_type_is_named_with_its_example_and_what_may_stand_there(label: Any) -> None:
    with pytest.raises(DataError, match=r"example 1 .*the number of a choice, 0 to 2, or its text, 'True', 'False'"
                       ) as told:
        check_answers(task_of([0, label, 1]), None, None)
    assert f"has the answer {label!r}, of type {type(label).__name__}" in str(told.value)
    assert check_answers(task_of([0, label]), 1, None) == []  # not scored


@pytest.mark.parametrize("label", [3, -1, 10**30, "0", "entailment", [], [7]])
def test_an_answer_that_is_no_choice_counts_as_wrong_and_is_told(label: Any) -> None:
    [told] = check_answers(task_of([0, label]), None, None)
    assert "1 of 2 examples have no right answer among their choices" in told
    assert f"example 1 (the first is 0) has the answer {label!r}, which is not the number of a choice, 0 to 2" in told
    with pytest.raises(DataError, match="no example has a right answer among its choices"):
        check_answers(task_of([label, label]), None, None)


def test_an_example_without_the_column_is_named() -> None:
    task = task_of([0, 1])
    del task.eval_docs[1]["label"]
    with pytest.raises(DataError, match="example 1 .* cannot be read: KeyError: 'label'"):
        check_answers(task, None, None)
    task = task_of([0, 1])
    task.eval_docs[0]["premise"] = "It rains."
    assert "example 1 " in first_unreadable(task, None, None)
    assert first_unreadable(task, 1, None) == ""


def test_a_column_of_two_types_is_named_with_its_place(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "validation.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"text": 5, "n": 1}\n{"n": 1.5}\n')
    with pytest.raises(DataError, match=r"validation.jsonl:3: text = 5 is of type int, and of type str in .*jsonl:2"):
        LocalSplits(tmp_path)["validation"]


def test_a_table_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "validation.csv").write_bytes(b"premise,label\nIt r\xe9ins.,0\n")
    with pytest.raises(DataError, match=r"validation.csv: premise is not UTF-8 text"):
        LocalSplits(tmp_path)["validation"]
