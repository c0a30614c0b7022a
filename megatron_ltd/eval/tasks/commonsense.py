"""Everyday knowledge: HellaSwag, PIQA, WinoGrande, COPA and the Winograd schema challenge."""

import re
from pathlib import Path

from megatron_ltd.errors import DataError
from megatron_ltd.eval.tasks.choices import ChoiceTask, Example, choose, complete
from megatron_ltd.eval.tasks.records import Record, numbered, read_records
from megatron_ltd.eval.tasks.task_files import PACKED_SUFFIXES, read_text

BLANK = "_"
CONNECTORS = {"cause": "because", "effect": "therefore"}
POSSESSIVES = {"my", "his", "her", "our", "their"}
CAPITALIZED = {"A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"}


def without_markup(text: str) -> str:
    """HellaSwag's texts without the marks that the collection of WikiHow left."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(record: Record) -> Example:
    """How an activity goes on."""
    context = f"{record.text('activity_label')}: {record.text('ctx_a')} {record.text('ctx_b').capitalize()}"
    endings = [without_markup(ending) for ending in record.texts("endings")]
    return choose(record, without_markup(context), endings, record.option(numbered(len(endings)), "label"))


def piqa(record: Record) -> Example:
    """Which of two ways reaches a goal."""
    choices = [record.text("sol1"), record.text("sol2")]
    return choose(record, f"Question: {record.text('goal')}\nAnswer:", choices, record.option(numbered(2), "label"))


def piqa_records(path: Path, limit: int | None) -> list[Record]:
    """PIQA keeps its labels in a file of their own, a line for each example.

    Raises:
        DataError: it is not there, or not as long as the examples.
    """
    records = read_records(path, limit)
    if all(record.has("label") for record in records):
        return records
    name = f"{path.name.split('.')[0]}-labels.lst"
    labels = next((path.with_name(name + suffix) for suffix in PACKED_SUFFIXES
                   if path.with_name(name + suffix).is_file()), None)
    if labels is None:
        raise DataError(f"{records[0].place} has no label, and there is no {path.with_name(name)}. Put it there.")
    lines = read_text(labels).split()
    every = len(records) if limit is None else len(lines)
    if len(lines) != every or len(lines) < len(records):
        raise DataError(f"{labels} has {len(lines)} labels for the {len(records)} examples of {path}. Get both again.")
    return [Record({**record.values, "label": label}, record.place, record.group)
            for record, label in zip(records, lines, strict=False)]


def winogrande(record: Record) -> Example:
    """Which of two names fills the blank: the rest of the sentence decides."""
    before, blank, after = record.text("sentence").partition(BLANK)
    if not blank or not after.strip():
        raise record.error(f"the sentence needs a blank, {BLANK!r}, and text after it")
    options = [record.text("option1"), record.text("option2")]
    return complete(record, [before + option for option in options], after.strip(),
                    record.option({"1": 0, "2": 1, 1: 0, 2: 1}, "answer"))


def copa(record: Record) -> Example:
    """Which of two sentences is the cause or the effect of a third."""
    connector = CONNECTORS.get(record.text("question"))
    if connector is None:
        raise record.error(f"question = {record.text('question')!r} must be one of {', '.join(CONNECTORS)}")
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
        contexts = record.texts("context_options")
        return complete(record, contexts, record.text("continuation"), record.option(numbered(len(contexts)), "gold"))
    text, pronoun, place = record.text("text").replace("  ", " "), record.text("pronoun"), record.any("pronoun_loc")
    options = record.texts("options")
    if type(place) is not int or not 0 < place < len(text) - len(pronoun):
        raise record.error(f"pronoun_loc = {place!r} lies outside the text")
    starts_sentence = text[max(0, place - 2)] == "."
    contexts = [text[:place] + _as_said(option, pronoun, starts_sentence) for option in options]
    return complete(record, contexts, text[place + len(pronoun):], record.option(numbered(len(options)), "label"))


def _as_said(option: str, pronoun: str, starts_sentence: bool) -> str:
    """An option in the pronoun's place: possessive where that is, small where no sentence begins."""
    if pronoun.lower() in POSSESSIVES:
        option += "'s"
    first = option.split()[0]
    return option.replace(first, first.lower()) if first in CAPITALIZED and not starts_sentence else option


TASKS = {
    "hellaswag": ChoiceTask(("hellaswag/hellaswag_val.jsonl", "hellaswag/validation.jsonl"), hellaswag,
                            training=("hellaswag_train.jsonl", "train.jsonl")),
    "piqa": ChoiceTask(("piqa/valid.jsonl", "piqa/validation.jsonl"), piqa, training=("train.jsonl",),
                       records=piqa_records),
    "winogrande": ChoiceTask(("winogrande/winogrande_xl_dev.jsonl", "winogrande/dev.jsonl",
                              "winogrande/validation.jsonl"), winogrande, ("acc",),
                             training=("winogrande_xl_train.jsonl", "train_xl.jsonl", "train.jsonl")),
    "copa": ChoiceTask(("copa/val.jsonl", "copa/validation.jsonl"), copa, ("acc",), training=("train.jsonl",)),
    "wsc273": ChoiceTask(("wsc273/winograd_wsc.jsonl", "wsc273/test.jsonl"), wsc273, ("acc",)),
}
