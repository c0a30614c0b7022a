"""The tasks by name, and which of them a run scores on which files."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, DataError, UserError
from megatron_ltd.lm_eval.requests import TokenScorer
from megatron_ltd.lm_eval.results import EvalOptions, TaskResult
from megatron_ltd.lm_eval.tasks import lambada, perplexity, questions, wikitext
from megatron_ltd.lm_eval.tasks.choices import ChoiceTask
from megatron_ltd.lm_eval.tasks.questions import QUESTION, from_template
from megatron_ltd.lm_eval.tasks.task_files import find_task_file, sha256_of

Evaluate = Callable[[Path, TokenScorer, Tokenizer, EvalOptions], TaskResult]


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        files: where its file lies under --task-data, unpacked names, the first that exists counts.
        evaluate: scores a file.
    """

    files: tuple[str, ...]
    evaluate: Evaluate


YES_OR_NO = "{answer}\nIs the answer correct? "


def _anli(number: int) -> ChoiceTask:
    return ChoiceTask(
        (f"anli/R{number}/test.jsonl", f"anli/test_r{number}.jsonl"),
        from_template("{premise|context}\nQuestion: {hypothesis} True, False, or Neither?\nAnswer:",
                      "True", "Neither", "False",
                      labels={"e": 0, "n": 1, "c": 2, "entailment": 0, "neutral": 1, "contradiction": 2}),
        ("acc",), training=("train.jsonl", f"train_r{number}.jsonl"), draws_a_spare=False)


CHOICE_TASKS = {
    "hellaswag": ChoiceTask(("hellaswag/hellaswag_val.jsonl", "hellaswag/validation.jsonl"), questions.hellaswag,
                            training=("hellaswag_train.jsonl", "train.jsonl")),
    "piqa": ChoiceTask(("piqa/valid.jsonl", "piqa/validation.jsonl"),
                       from_template("Question: {goal}\nAnswer:", "{sol1}", "{sol2}"),
                       training=("train.jsonl",), records=questions.piqa_records),
    "winogrande": ChoiceTask(
        ("winogrande/winogrande_xl_dev.jsonl", "winogrande/dev.jsonl", "winogrande/validation.jsonl"),
        questions.winogrande, ("acc",), training=("winogrande_xl_train.jsonl", "train_xl.jsonl", "train.jsonl")),
    "copa": ChoiceTask(("copa/val.jsonl", "copa/validation.jsonl"), questions.copa, ("acc",),
                       training=("train.jsonl",)),
    "wsc273": ChoiceTask(("wsc273/winograd_wsc.jsonl", "wsc273/test.jsonl"), questions.wsc273, ("acc",)),
    "arc_easy": ChoiceTask(("arc/ARC-Easy-Test.jsonl", "arc_easy/test.jsonl"), questions.arc,
                           training=("ARC-Easy-Train.jsonl", "train.jsonl"), draws_a_spare=False),
    "arc_challenge": ChoiceTask(("arc/ARC-Challenge-Test.jsonl", "arc_challenge/test.jsonl"), questions.arc,
                                training=("ARC-Challenge-Train.jsonl", "train.jsonl"), draws_a_spare=False),
    "openbookqa": ChoiceTask(("openbookqa/Main/test.jsonl", "openbookqa/Main/test.tsv", "openbookqa/test.jsonl"),
                             questions.openbookqa, training=("train.jsonl", "train.tsv"), draws_a_spare=False),
    "sciq": ChoiceTask(("sciq/test.json", "sciq/test.jsonl", "sciq/valid.json", "sciq/validation.jsonl"),
                       questions.sciq, training=("train.json", "train.jsonl"), draws_a_spare=False),
    "boolq": ChoiceTask(
        ("boolq/dev.jsonl", "boolq/val.jsonl", "boolq/validation.jsonl"),
        from_template("{passage}\nQuestion: {question}?\nAnswer:", "no", "yes", label=("answer", "label"),
                      labels={"False": 0, "True": 1}),
        ("acc",), training=("train.jsonl",)),
    "rte": ChoiceTask(
        ("rte/val.jsonl", "rte/validation.jsonl"),
        from_template("{premise|sentence1}\nQuestion: {hypothesis|sentence2} True or False?\nAnswer:", "True", "False",
                      labels={"entailment": 0, "not_entailment": 1}),
        ("acc",), training=("train.jsonl",)),
    "anli_r1": _anli(1), "anli_r2": _anli(2), "anli_r3": _anli(3),
    "race": ChoiceTask(("race/test.jsonl", "race/high/test.jsonl"), questions.race, ("acc",)),
    # The right choice of label 1 is "no", as lm-evaluation-harness has it.
    "multirc": ChoiceTask(("multirc/val.jsonl", "multirc/validation.jsonl"),
                          from_template("{paragraph}\n" + QUESTION, YES_OR_NO + "yes", YES_OR_NO + "no"), ("acc",),
                          training=("train.jsonl",)),
    # Of two sentences that differ in one point of grammar, the right one must be more probable
    # (https://arxiv.org/abs/1912.00582).
    "blimp": ChoiceTask(("blimp/blimp.zip", "blimp/blimp.jsonl"),
                        from_template("", "{sentence_good}", "{sentence_bad}", right=0), ("acc",), by_group=True,
                        fewshot=False, protocol="mean over the paradigms, each as in lm-evaluation-harness"),
    "webqs": ChoiceTask(("webqs/test.jsonl", "webqs/test.json"), questions.webqs, ("exact_match",),
                        training=("train.jsonl", "train.json"), draws_a_spare=False),
}
"""Which files, examples and metrics each choice task has."""

TASKS: dict[str, Task | ChoiceTask] = {
    "lambada": Task(lambada.FILES, lambada.evaluate),
    "wikitext": Task(wikitext.FILES, wikitext.evaluate),
    "perplexity": Task(perplexity.FILES, perplexity.evaluate),
    **CHOICE_TASKS,
}


Answer = Callable[[TokenScorer, Tokenizer, EvalOptions], dict[str, TaskResult]]


@dataclass(frozen=True)
class TaskRun:
    """A task to score.

    Args:
        name: as listed, and how its result is called if it has only one.
        path: its file or folder.
        sha256: of its files.
        evaluate: gives its results by name.
        problem: why it cannot run, if that is known beforehand.
        load: of a task of lm-evaluation-harness: read its examples, so that what is missing is found beforehand.
    """

    name: str
    path: Path
    sha256: str
    evaluate: Answer
    problem: UserError | None = None
    load: Callable[[EvalOptions], object] | None = None

    @property
    def of_harness(self) -> bool:
        return self.load is not None


def plan_tasks(items: Sequence[str], folder: Path | None) -> list[TaskRun]:
    """The runs of `lambada`, `wikitext`, `perplexity=FILE`; one whose file is not there has that for its problem.

    A task's result has its name; a task listed with several files has one result `name:file` for each.

    Raises:
        ConfigError: a task is listed twice.
    """
    times = Counter(item.partition("=")[0] for item in items)
    runs: list[TaskRun] = []
    for item in items:
        name, given = item.partition("=")[0], Path(item.partition("=")[2])
        label = name if times[name] == 1 else f"{name}:{given.name}"
        try:
            path = _path_of(item, folder)
            runs.append(TaskRun(label, path, sha256_of(path), _answer(label, TASKS[name].evaluate, path)))
        except UserError as error:
            runs.append(TaskRun(label, given, "", _answer(label, TASKS[name].evaluate, given), error))
    repeated = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if repeated:
        raise ConfigError(f"task {', '.join(repeated)} is listed more than once. Keep one, or rename one of the files.")
    return runs


def _answer(label: str, evaluate: Evaluate, path: Path) -> Answer:
    return lambda scorer, tokenizer, options: {label: evaluate(path, scorer, tokenizer, options)}


def _path_of(item: str, folder: Path | None) -> Path:
    name, named, given = item.partition("=")
    if named:
        if not Path(given).is_file():
            raise DataError(f"task {item}: there is no file {given!r}. Check the path.")
        return Path(given)
    if not TASKS[name].files:
        raise ConfigError(f"task {name} has no file of its own. Name one: {name}=PATH.")
    if folder is None:
        raise ConfigError(f"task {name} needs --task-data, the folder of its file, or a file: {name}=PATH.")
    return find_task_file(name, folder, TASKS[name].files)
