"""Questions about a passage, and what follows from it: BoolQ, RACE, MultiRC, ReCoRD, RTE, ANLI."""

import ast
import re
import string
from collections import Counter
from dataclasses import replace
from typing import Any

from megatron_ltd.eval.tasks.choices import ChoiceTask, Example, choose
from megatron_ltd.eval.tasks.records import Record, numbered

LETTERS = {letter: index for index, letter in enumerate("ABCD")}
HIGHLIGHT = "\n@highlight\n"
PLACEHOLDER = "@placeholder"
RACE_BLANK = "  _  ."
ARTICLES = re.compile(r"\b(a|an|the)\b")


def boolq(record: Record) -> Example:
    """A question that is answered with yes or no."""
    context = f"{record.text('passage')}\nQuestion: {record.text('question')}?\nAnswer:"
    return choose(record, context, ["no", "yes"], record.option({**numbered(2), "False": 0, "True": 1},
                                                                "answer", "label"))


def rte(record: Record) -> Example:
    """Whether a sentence follows from a text."""
    labels = {**numbered(2), "entailment": 0, "not_entailment": 1}
    text, claim = record.text("premise", "sentence1"), record.text("hypothesis", "sentence2")
    context = f"{text}\nQuestion: {claim} True or False?\nAnswer:"
    return choose(record, context, ["True", "False"], record.option(labels, "label"))


def anli(record: Record) -> Example:
    """Whether a sentence follows from a text, contradicts it, or neither."""
    labels = {**numbered(3), "e": 0, "n": 1, "c": 2, "entailment": 0, "neutral": 1, "contradiction": 2}
    context = (f"{record.text('premise', 'context')}\nQuestion: {record.text('hypothesis')} True, False, or Neither?"
               "\nAnswer:")
    return choose(record, context, ["True", "Neither", "False"], record.option(labels, "label"))


def race(record: Record) -> Example:
    """The last question about an article, after the others with their answers."""
    problems = _race_problems(record)
    text = f"Article: {record.text('article')}\n\n"
    for problem in problems[:-1]:
        question, right = problem.text("question"), _race_answer(problem)
        if question.endswith(RACE_BLANK):
            text += f"{question[:-5]}{right}\n"
        else:
            text += f"Question: {question}\nAnswer: {right}\n"
    last = problems[-1]
    return choose(record, text + last.text("question"), last.texts("options")[:4], last.option(LETTERS, "answer"))


def _race_answer(problem: Record) -> str:
    options = problem.texts("options")
    index = problem.option(LETTERS, "answer")
    if index >= len(options):
        raise problem.error(f"the answer is choice {index + 1} of {len(options)}")
    return options[index]


def _race_problems(record: Record) -> list[Record]:
    """RACE's own layout has parallel lists; the hub's a list of objects, or one written as text."""
    problems: Any
    if record.has("questions"):
        columns = [record.any(name) for name in ("questions", "options", "answers")]
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise record.error("questions, options and answers must be lists of one length")
        names = ("question", "options", "answer")
        problems = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    else:
        problems = record.any("problems")
        if isinstance(problems, str):
            try:
                problems = ast.literal_eval(problems)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise record.error(f"problems cannot be read: {error}") from error
    if not isinstance(problems, list) or not problems or not all(isinstance(problem, dict) for problem in problems):
        raise record.error("problems must be a list of objects with question, options and answer")
    return [Record(problem, f"{record.place}, problem {i + 1}") for i, problem in enumerate(problems)]


def multirc(record: Record) -> Example:
    """Whether an answer is right. The right choice of label 1 is "no", as lm-evaluation-harness has it."""
    context = f"{record.text('paragraph')}\nQuestion: {record.text('question')}\nAnswer:"
    choices = [f"{record.text('answer')}\nIs the answer correct? {word}" for word in ("yes", "no")]
    return choose(record, context, choices, record.option(numbered(2), "label"))


def record_task(record: Record) -> Example:
    """Which entity fills the blank of a sentence about a news article."""
    first, *highlights = record.text("passage").strip().split(HIGHLIGHT)
    context = f"{first}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)
    entities, answers = sorted(set(record.texts("entities"))), sorted(set(record.texts("answers")))
    query = record.text("query")
    choices = [f"  - {query}".replace(PLACEHOLDER, entity) for entity in entities]
    gold = frozenset(i for i, entity in enumerate(entities) if entity in answers)
    if not gold:
        raise record.error("no answer is one of the entities")
    credits = {"f1": tuple(max(word_f1(entity, answer) for answer in answers) for entity in entities),
               "em": tuple(max(float(normalized(entity) == normalized(answer)) for answer in answers)
                           for entity in entities)}
    return replace(choose(record, context, choices, min(gold)), gold=gold, credits=credits)


def normalized(answer: str) -> list[str]:
    """Words of an answer, without case, punctuation and articles, as SQuAD compares them."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", text).split()


def word_f1(said: str, right: str) -> float:
    """Harmonic mean of the shares of common words."""
    mine, theirs = normalized(said), normalized(right)
    if not mine or not theirs:
        return float(mine == theirs)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs))


def _anli_task(number: int) -> ChoiceTask:
    return ChoiceTask((f"anli/R{number}/test.jsonl", f"anli/test_r{number}.jsonl"), anli, ("acc",),
                      training=("train.jsonl", f"train_r{number}.jsonl"), draws_a_spare=False)


TASKS = {
    "boolq": ChoiceTask(("boolq/dev.jsonl", "boolq/val.jsonl", "boolq/validation.jsonl"), boolq, ("acc",),
                        training=("train.jsonl",)),
    "rte": ChoiceTask(("rte/val.jsonl", "rte/validation.jsonl"), rte, ("acc",), training=("train.jsonl",)),
    "anli_r1": _anli_task(1), "anli_r2": _anli_task(2), "anli_r3": _anli_task(3),
    "race": ChoiceTask(("race/test.jsonl", "race/high/test.jsonl"), race, ("acc",)),
    "multirc": ChoiceTask(("multirc/val.jsonl", "multirc/validation.jsonl"), multirc, ("acc",),
                          training=("train.jsonl",)),
    "record": ChoiceTask(("record/val.jsonl", "record/validation.jsonl"), record_task, ("f1", "em"),
                         training=("train.jsonl",)),
}
