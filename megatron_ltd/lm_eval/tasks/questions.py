"""How the examples of each choice task are read: a template where that is enough, else a function.

Prompts are lm-evaluation-harness's. Of a task that is published in several layouts, all are read.
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.tasks.choices import Example, choose, question
from megatron_ltd.lm_eval.tasks.records import Record, numbered
from megatron_ltd.lm_eval.tasks.task_files import first_packed, read_records, read_text

QUESTION = "Question: {question}\nAnswer:"
CONNECTORS = ("because", "therefore")
POSSESSIVES = {"my", "his", "her", "our", "their"}
CAPITALIZED = {"A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"}
LETTERS = {letter: index for index, letter in enumerate("ABCD")}
LETTERED = re.compile(r"\(([A-E])\)")
RACE_BLANK = "  _  ."


def from_template(context: str, *choices: str, label: tuple[str, ...] = ("label",),
                  labels: dict[str, int] | None = None, right: int | None = None) -> Callable[[Record], Example]:
    """A reader of examples whose context and choices are templates, as of `Record.filled`.

    Args:
        label: the field with the right choice, or alternatives.
        labels: what it may say, besides the numbers of the choices from 0.
        right: the right choice of every example, which then needs no label.
    """
    options = numbered(len(choices)) | (labels or {})

    def read(record: Record) -> Example:
        gold = record.option(options, *label) if right is None else right
        return choose(record, record.filled(context), [record.filled(choice) for choice in choices], gold)

    return read


def piqa_records(path: Path, limit: int | None) -> list[Record]:
    """PIQA keeps its labels in a file of their own, one line for each example.

    Raises:
        DataError: it is not there, or not as long as the examples.
    """
    records = read_records(path, limit)
    if all(record.has("label") for record in records):
        return records
    wanted = path.with_name(f"{path.name.split('.')[0]}-labels.lst")
    labels = first_packed([wanted])
    if labels is None:
        raise DataError(f"{records[0].place} has no label, and there is no {wanted}. Put it there.")
    lines = read_text(labels)[0].split()
    if len(lines) < len(records) or (limit is None and len(lines) > len(records)):
        raise DataError(f"{labels} has {len(lines)} labels for the {len(records)} examples of {path}. Get both again.")
    return [Record({**record.values, "label": label}, record.place, record.group)
            for record, label in zip(records, lines, strict=False)]


def hellaswag(record: Record) -> Example:
    """How an activity continues."""
    context = record.filled("{activity_label}: {ctx_a} ") + record.text("ctx_b").capitalize()
    endings = [without_markup(ending) for ending in record.texts("endings")]
    return choose(record, without_markup(context), endings, record.option(numbered(len(endings)), "label"))


def without_markup(text: str) -> str:
    """HellaSwag's texts without the marks left over from WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def winogrande(record: Record) -> Example:
    """Which of two names fills the blank: the rest of the sentence decides."""
    before, blank, after = record.text("sentence").partition("_")
    if not blank or not after.strip():
        raise record.error("the sentence needs a blank, '_', and text after it")
    pairs = [(before + record.text(name), after.strip()) for name in ("option1", "option2")]
    return question(record, pairs, [record.option({"1": 0, "2": 1}, "answer")])


def copa(record: Record) -> Example:
    """Which of two sentences is the cause or the effect of a third."""
    connector = CONNECTORS[record.option({"cause": 0, "effect": 1}, "question")]
    choices = [record.text("choice1"), record.text("choice2")]
    if not all(choices):
        raise record.error("a choice is empty")
    # A space beside the delimiter, as the harness has it.
    lowered = [" " + choice[0].lower() + choice[1:] for choice in choices]
    context = f"{record.text('premise').strip()[:-1]} {connector}"
    return choose(record, context, lowered, record.option(numbered(2), "label"))


def wsc273(record: Record) -> Example:
    """What a pronoun stands for, in the layout of partial evaluation or with the pronoun's place in the text."""
    if record.has("context_options"):
        pairs = [(context, record.text("continuation")) for context in record.texts("context_options")]
        return question(record, pairs, [record.option(numbered(len(pairs)), "gold")])
    text, pronoun, place = record.text("text").replace("  ", " "), record.text("pronoun"), record.any("pronoun_loc")
    options = record.texts("options")
    if type(place) is not int or not 0 < place < len(text) - len(pronoun):
        raise record.error(f"pronoun_loc = {place!r} lies outside the text")
    if not all(map(str.strip, options)):
        raise record.error(f"options = {options!r}: an option is empty")
    starts_sentence = text[max(0, place - 2)] == "."
    pairs = [(text[:place] + _as_said(option, pronoun, starts_sentence), text[place + len(pronoun):])
             for option in options]
    return question(record, pairs, [record.option(numbered(len(pairs)), "label")])


def _as_said(option: str, pronoun: str, starts_sentence: bool) -> str:
    """An option in the pronoun's place: possessive if that is, in lower case unless it starts a sentence."""
    if pronoun.lower() in POSSESSIVES:
        option += "'s"
    first = option.split()[0]
    return option.replace(first, first.lower()) if first in CAPITALIZED and not starts_sentence else option


def race(record: Record) -> Example:
    """The last question about an article, after the others with their answers."""
    text = record.filled("Article: {article}\n\n")
    *others, last = _race_problems(record)
    for problem in others:
        asked, options = problem.text("question"), problem.texts("options")
        gold = problem.option(LETTERS, "answer")
        if gold >= len(options):
            raise problem.error(f"the answer is choice {gold + 1} of {len(options)}")
        text += (f"{asked[:-5]}{options[gold]}\n" if asked.endswith(RACE_BLANK)
                 else f"Question: {asked}\nAnswer: {options[gold]}\n")
    return choose(record, text + last.text("question"), last.texts("options")[:4], last.option(LETTERS, "answer"))


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


def arc(record: Record) -> Example:
    """A question of the AI2 Reasoning Challenge."""
    stem, texts, gold = _labelled(record)
    return choose(record, QUESTION.format(question=stem), texts, gold)


def openbookqa(record: Record) -> Example:
    """A question whose answer continues its stem; the published table has all choices in one column."""
    table = record
    if record.has("Question Stem"):
        pieces = LETTERED.split(record.text("Choices"))
        choices = {"text": [text.strip() for text in pieces[2::2]], "label": pieces[1::2]}
        table = Record({"question": record.text("Question Stem"), "choices": choices,
                        "answerKey": record.text("Answer Key")}, record.place)
    return choose(record, *_labelled(table))


def _labelled(record: Record) -> tuple[str, list[str], int]:
    """The question, its choices and the right one. Choices are a list of objects, as AI2 writes it, inside the question
    or beside it, or two lists, as on the hub."""
    inside = isinstance(record.values.get("question"), dict)
    asked = record.part("question") if inside else record
    stem = asked.text("stem") if inside else record.text("question", "question_stem")
    choices = asked.any("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, dict):
        raise record.error("choices must be objects with text and label, or two lists text and label")
    both = Record(choices, f"{record.place}, choices")
    texts, labels = both.texts("text"), both.texts("label")
    if len(texts) != len(labels) or len(texts) < 2:
        raise record.error(f"there are {len(texts)} choices and {len(labels)} labels")
    key = str(record.any("answerKey")).lstrip()
    if key not in labels:
        raise record.error(f"answerKey = {record.any('answerKey')!r} must be one of {', '.join(map(repr, labels))}")
    return stem, texts, labels.index(key)


def sciq(record: Record) -> Example:
    """A question, after the paragraph that answers it if there is one."""
    support = record.text("support").lstrip() if record.values.get("support") else ""
    choices = [record.text(name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return choose(record, f"{support}\n{record.filled(QUESTION)}", choices, 3)


def webqs(record: Record) -> Example:
    """A question of the web with all answers that count. One that begins with another counts as that one."""
    kept: list[str] = []
    for answer in sorted(record.texts("answers")):
        if not kept or not answer.startswith(kept[-1]):
            kept.append(answer)
    return question(record, [(record.filled(QUESTION), answer) for answer in kept], range(len(kept)))
