"""lm-evaluation-harness's tasks on local files: it is given the examples in the layout it would download."""

import gzip
import importlib
import json
import re
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

Doc = dict[str, Any]
BLIMP_PARADIGM = "wh_island"


def jsonl(path: Path) -> list[Doc]:
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        return [json.loads(line) for line in file]


def hellaswag(tasks: Path) -> list[Doc]:
    return [doc | {"label": str(doc["label"])} for doc in jsonl(tasks / "hellaswag/hellaswag_val.jsonl.gz")]


def piqa(tasks: Path) -> list[Doc]:
    labels = (tasks / "piqa/valid-labels.lst").read_text().split()
    return [doc | {"label": int(label)}
            for doc, label in zip(jsonl(tasks / "piqa/valid.jsonl.gz"), labels, strict=True)]


def with_choice_lists(doc: Doc, **names: str) -> Doc:
    choices = doc["question"]["choices"]
    both = {"text": [choice["text"] for choice in choices], "label": [choice["label"] for choice in choices]}
    return {"choices": both, "answerKey": doc["answerKey"], names["stem"]: doc["question"]["stem"]}


def arc(name: str) -> Callable[[Path], list[Doc]]:
    return lambda tasks: [with_choice_lists(doc, stem="question")
                          for doc in jsonl(tasks / f"arc/ARC-{name}-Test.jsonl.gz")]


def openbookqa(tasks: Path) -> list[Doc]:
    docs = []
    for line in (tasks / "openbookqa/Main/test.tsv").read_text().splitlines()[1:]:
        _, stem, choices, _, key = line.split("\t")
        texts = [text for text in re.split(r"\s*\([A-D]\) ", choices) if text]
        labelled = {"text": texts, "label": ["A", "B", "C", "D"]}
        docs.append({"question_stem": stem, "choices": labelled, "answerKey": key})
    return docs


def sciq(tasks: Path) -> list[Doc]:
    with gzip.open(tasks / "sciq/valid.json.gz", "rt") as file:
        return json.load(file)


def boolq(tasks: Path) -> list[Doc]:
    return [doc | {"label": int(doc["answer"])} for doc in jsonl(tasks / "boolq/dev.jsonl.gz")]


def rte(tasks: Path) -> list[Doc]:
    return [{"sentence1": doc["premise"], "sentence2": doc["hypothesis"], "label": int(doc["label"] != "entailment")}
            for doc in jsonl(tasks / "rte/val.jsonl")]


def blimp(tasks: Path) -> list[Doc]:
    with zipfile.ZipFile(tasks / "blimp/blimp.zip") as archive:
        return [json.loads(line) for line in archive.read(f"blimp/{BLIMP_PARADIGM}.jsonl").splitlines()]


DOCS: dict[str, Callable[[Path], list[Doc]]] = {
    "hellaswag": hellaswag, "piqa": piqa, "arc_easy": arc("Easy"), "arc_challenge": arc("Challenge"), "sciq": sciq,
    "winogrande": lambda tasks: jsonl(tasks / "winogrande/winogrande_xl_dev.jsonl.gz"), "openbookqa": openbookqa,
    "boolq": boolq, "rte": rte, "copa": lambda tasks: jsonl(tasks / "copa/val.jsonl"), "blimp": blimp,
}
"""Task -> the examples of its local file, as the harness's dataset has them."""

SHARED_FILES = {
    "hellaswag": "hellaswag/hellaswag_val.jsonl.gz", "piqa": "piqa/valid.jsonl.gz", "sciq": "sciq/valid.json.gz",
    "arc_easy": "arc/ARC-Easy-Test.jsonl.gz", "arc_challenge": "arc/ARC-Challenge-Test.jsonl.gz",
    "winogrande": "winogrande/winogrande_xl_dev.jsonl.gz", "openbookqa": "openbookqa/Main/test.tsv",
    "boolq": "boolq/dev.jsonl.gz", "rte": "rte/val.jsonl", "copa": "copa/val.jsonl", "blimp": "blimp/blimp.zip",
}

INVENTED: dict[str, list[Doc]] = {
    "wsc273": [
        {"text": "The city councilmen refused the demonstrators a permit because they feared violence.",
         "pronoun": "they", "pronoun_loc": 63, "options": ["The city councilmen", "The demonstrators"], "label": 0},
        {"text": "Ann asked Mary what time the  library closes, because she had forgotten.", "pronoun": "she",
         "pronoun_loc": 50, "options": ["Ann", "Mary"], "label": 1},
        {"text": "John was doing research in the library when he heard a man humming. He was very annoyed.",
         "pronoun": "He", "pronoun_loc": 68, "options": ["John", "The man"], "label": 0},
        {"text": "Dan sat next to Bill. He could not stand his smell.", "pronoun": "his", "pronoun_loc": 41,
         "options": ["Dan", "The other man"], "label": 1},
    ],
    "race": [
        {"article": "A boy found a dog.", "problems": str([
            {"question": "The dog was found by  _  .", "options": ["a boy", "a girl", "a cat", "me"], "answer": "A"},
            {"question": "Was it big?", "options": ["Yes.", "No.", "It does not say.", "Very."], "answer": "C"},
            {"question": "What did the boy find?", "options": ["A cat", "A dog", "A cow", "Luck"], "answer": "B"}])},
        {"article": "It rained.", "problems": str([
            {"question": "It _ all day.", "options": ["rained", "snowed", "shone", "blew"], "answer": "A"}])},
    ],
    "multirc": [
        {"paragraph": "Rain fell on the town.", "question": "What fell?", "answer": "Rain", "label": 1},
        {"paragraph": "Rain fell on the town.", "question": "What fell?", "answer": "Snow", "label": 0},
    ],
    "anli_r1": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        {"premise": "It rains.", "hypothesis": "It is Monday.", "label": 1},
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
    ],
    "webqs": [
        {"question": "who wrote it?", "answers": ["Ann Lee", "Bob", "Ann", "Bobby Tables"]},
        {"question": "where is it?", "answers": ["Oslo"]},
    ],
}
"""Tasks without a public file at hand: examples in the harness's layout."""


@cache
def task_manager() -> Any:
    """The index of the harness's tasks, which takes seconds to read."""
    return importlib.import_module("lm_eval.tasks").TaskManager()


def shared_name(task: str) -> str:
    """What the harness calls a task."""
    return f"blimp_{BLIMP_PARADIGM}" if task == "blimp" else task


def harness_task(task: str, docs: list[Doc], training: list[Doc] | None = None) -> Any:
    """The harness's task with these examples in every split, or with others to train on."""
    datasets = importlib.import_module("datasets")
    given = datasets.Dataset.from_list(docs)
    learnt = given if training is None else datasets.Dataset.from_list(training)
    splits = dict.fromkeys(("validation", "test", "dev_r1", "test_r1"), given) | {"train": learnt, "train_r1": learnt}
    with mock.patch.object(datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(splits)):
        loaded = task_manager().load([shared_name(task)])
    return loaded["tasks"][shared_name(task)]
