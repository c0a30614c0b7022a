"""School science: ARC, OpenBookQA and SciQ."""

import re

from megatron_ltd.eval.tasks.choices import ChoiceTask, Example, choose
from megatron_ltd.eval.tasks.records import Record

LETTERED = re.compile(r"\(([A-E])\)")


def labelled_choices(record: Record) -> tuple[list[str], list[str]]:
    """Texts and labels of the choices: a list of objects, as AI2 writes it, or two lists, as on the hub."""
    choices = record.any("choices")
    if isinstance(choices, dict):
        both = record.part("choices")
        texts, labels = both.texts("text"), both.texts("label")
    elif isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        parts = [Record(choice, record.place) for choice in choices]
        texts, labels = [part.text("text") for part in parts], [part.text("label") for part in parts]
    else:
        raise record.error("choices must be objects with text and label, or two lists text and label")
    if len(texts) != len(labels) or len(texts) < 2:
        raise record.error(f"there are {len(texts)} choices and {len(labels)} labels")
    return texts, labels


def answer(record: Record, labels: list[str]) -> int:
    return record.option({label: index for index, label in enumerate(labels)}, "answerKey")


def _stem(record: Record) -> tuple[str, Record]:
    """The question, and where its choices stand."""
    if isinstance(record.values.get("question"), dict):
        inner = record.part("question")
        return inner.text("stem"), inner
    return record.text("question", "question_stem"), record


def arc(record: Record) -> Example:
    """A question of the AI2 Reasoning Challenge."""
    stem, place = _stem(record)
    texts, labels = labelled_choices(place)
    return choose(record, f"Question: {stem}\nAnswer:", texts, answer(record, labels))


def openbookqa(record: Record) -> Example:
    """A question whose answer goes on where its stem ends."""
    if record.has("Question Stem"):
        pieces = LETTERED.split(record.text("Choices"))
        labels, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
        gold = record.option({label: index for index, label in enumerate(labels)}, "Answer Key")
        return choose(record, record.text("Question Stem"), texts, gold)
    stem, place = _stem(record)
    texts, labels = labelled_choices(place)
    key = record.text("answerKey").lstrip()
    if key not in labels:
        raise record.error(f"answerKey = {key!r} must be one of {', '.join(labels)}")
    return choose(record, stem, texts, labels.index(key))


def sciq(record: Record) -> Example:
    """A question about a paragraph that answers it, if there is one."""
    support = record.values.get("support") or ""
    if not isinstance(support, str):
        raise record.error(f"support = {support!r} must be a text")
    choices = [record.text(name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return choose(record, f"{support.lstrip()}\nQuestion: {record.text('question')}\nAnswer:", choices, 3)


TASKS = {
    "arc_easy": ChoiceTask(("arc/ARC-Easy-Test.jsonl", "arc_easy/test.jsonl"), arc,
                           training=("ARC-Easy-Train.jsonl", "train.jsonl"), draws_a_spare=False),
    "arc_challenge": ChoiceTask(("arc/ARC-Challenge-Test.jsonl", "arc_challenge/test.jsonl"), arc,
                                training=("ARC-Challenge-Train.jsonl", "train.jsonl"), draws_a_spare=False),
    "openbookqa": ChoiceTask(("openbookqa/Main/test.jsonl", "openbookqa/Main/test.tsv", "openbookqa/test.jsonl"),
                             openbookqa, training=("train.jsonl", "train.tsv"), draws_a_spare=False),
    "sciq": ChoiceTask(("sciq/test.json", "sciq/test.jsonl", "sciq/valid.json", "sciq/validation.jsonl"), sciq,
                       training=("train.json", "train.jsonl"), draws_a_spare=False),
}
