"""Whether the harness can make something of a task's examples and of their right answers."""

from itertools import islice
from numbers import Integral
from typing import Any

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.harness.local import LocalSplits, scored_split

REPAIR = "Write the labels as in the data set that the harness would download."


def check_answers(task: Any, limit: int | None, splits: LocalSplits | None) -> list[str]:
    """Check that the right answers of a multiple-choice task are among its choices; says how many are not.

    The harness counts an example as wrong whose answer is a label that it does not know, such as a text where it
    expects a number, or -1 where the answer is kept secret; a label of another type, such as 0.0, ends its evaluation.

    Args:
        splits: the task's local files; None for a download.

    Raises:
        DataError: the harness cannot take an answer, or none can be right.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):  # which may take any answer
        return []
    bad, count, first = 0, 0, ""
    for number, doc in enumerate(islice(task.eval_docs, limit)):
        try:
            gold = (task.doc_to_text if getattr(task, "multiple_input", 0) else task.doc_to_target)(doc)
            choices = task.doc_to_choice(doc)
            allowed = f"the number of a choice, 0 to {len(choices) - 1}, or its text, {', '.join(map(repr, choices))}"
        except Exception as error:  # a task may hold any code
            raise DataError(f"{_place(task, number, splits)} cannot be read: {type(error).__name__}: {error}; it is "
                            f"{doc!r}"[:500] + ". Fix or remove the example.") from error
        label = f"{_place(task, number, splits)} has the answer {gold!r}"
        if not _has_a_known_type(gold):
            raise DataError(f"{label}, of type {type(gold).__name__}; it must be {allowed}"[:500] + f". {REPAIR}")
        if not any(one in (range(len(choices)) if isinstance(one, Integral) else choices) for one in _listed(gold)):
            bad, first = bad + 1, first or f"{label}, which is not {allowed}"
        count += 1
    if bad == count:
        raise DataError(f"no example has a right answer among its choices: {first}"[:500] + f". {REPAIR}")
    return [f"{task.task_name}: {bad} of {count} examples have no right answer among their choices and count as wrong: "
            f"{first}"[:500]] if bad else []


def first_unreadable(task: Any, limit: int | None, splits: LocalSplits | None) -> str:
    """Which example the harness cannot make a question of, to be added to what it says; empty if it can of all."""
    for number, doc in enumerate(islice(task.eval_docs, limit)):
        try:
            task.doc_to_text(doc), task.doc_to_target(doc)
        except Exception:  # a task may hold any code
            return f" The first it cannot read is {_place(task, number, splits)}: {doc!r}"[:500] + "."
    return ""


def _place(task: Any, number: int, splits: LocalSplits | None) -> str:
    files = "" if splits is None else f", {splits.names(scored_split(task))}"
    return f"{task.task_name}{files}, example {number} (the first is 0)"


def _listed(gold: Any) -> list[Any]:
    return gold if isinstance(gold, list) else [gold]


def _has_a_known_type(gold: Any) -> bool:
    """A choice's number or text, or a list of numbers."""
    if isinstance(gold, list):
        return all(isinstance(one, Integral) for one in gold)
    return isinstance(gold, Integral | str)
