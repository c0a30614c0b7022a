"""Tasks that ask which of several texts is the most probable: one machinery, a reader for each task.

    multiple choice      one context, a continuation for each choice
    partial evaluation   a context for each choice, one continuation (https://arxiv.org/abs/1806.02847)
    minimal pairs        no context, the choices are whole sentences

Scores are lm-evaluation-harness's: `acc` takes the choice of the largest log-probability, `acc_norm` of the largest per
character of the choice; the first of equals. `exact_match` asks whether a right choice is what the model would say.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError
from megatron_ltd.eval.pairs import PairEncoder
from megatron_ltd.eval.requests import ScoredRow, TokenScorer, score_rows
from megatron_ltd.eval.results import EvalOptions, Metric, TaskResult, mean_and_stderr
from megatron_ltd.eval.tasks.records import Record, read_records
from megatron_ltd.eval.tasks.task_files import PACKED_SUFFIXES

DELIMITER = " "
"""Between context and continuation."""
FEWSHOT_DELIMITER = "\n\n"
FEWSHOT_SEED = 1234
"""lm-evaluation-harness's, whose draws these are where the examples come from a file of their own."""


@dataclass(frozen=True)
class Example:
    """A question.

    Args:
        contexts: one, or one for each choice.
        continuations: one for each choice, or one.
        gold: the right choices.
        credits: metric -> what each choice is worth, for tasks that count more than right and wrong.
        group: the part of the task it belongs to.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: frozenset[int]
    place: str
    credits: dict[str, tuple[float, ...]] = field(default_factory=dict)
    group: str = ""

    @property
    def choices(self) -> int:
        return max(len(self.contexts), len(self.continuations))

    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of each choice."""
        contexts, continuations = (parts * self.choices if len(parts) == 1 else parts
                                   for parts in (self.contexts, self.continuations))
        return list(zip(contexts, continuations, strict=True))

    def solved(self) -> str:
        """The question with its answer, as an example to learn from."""
        context, continuation = self.pairs()[min(self.gold)]
        return context + DELIMITER + continuation


def choose(record: Record, context: str, choices: Sequence[str], gold: int) -> Example:
    """A multiple-choice question."""
    if not 0 <= gold < len(choices):
        raise record.error(f"the answer is choice {gold + 1} of {len(choices)}")
    if not all(choices):
        raise record.error("a choice is empty")
    return Example((context,), tuple(choices), frozenset((gold,)), record.place, group=record.group)


def complete(record: Record, contexts: Sequence[str], continuation: str, gold: int) -> Example:
    """A question for partial evaluation."""
    if not 0 <= gold < len(contexts):
        raise record.error(f"the answer is choice {gold + 1} of {len(contexts)}")
    return Example(tuple(contexts), (continuation,), frozenset((gold,)), record.place, group=record.group)


@dataclass(frozen=True)
class ChoiceTask:
    """A task.

    Args:
        files: where its file lies under the task folder, the first that exists counts.
        example: reads one record.
        metrics: those it reports, the headline first.
        training: names of files with examples to learn from, looked for beside the task's file.
        records: reads the file.
        by_group: the headline is the mean over groups, each of which is reported too.
        fewshot: whether solved examples may come before a question.
        draws_a_spare: one more of them is drawn than shown, as lm-evaluation-harness does for tasks without a test set.
    """

    files: tuple[str, ...]
    example: Callable[[Record], Example]
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    training: tuple[str, ...] = ()
    records: Callable[[Path, int | None], list[Record]] = read_records
    by_group: bool = False
    fewshot: bool = True
    draws_a_spare: bool = True
    protocol: str = "prompts and metrics as lm-evaluation-harness"

    def evaluate(self, path: Path, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> TaskResult:
        """The task's metrics on a file."""
        examples, prompts, shown = self.questions(path, options)
        encoder = PairEncoder(tokenizer, scorer.max_length, options.bos)
        rows, cut = zip(*(encoder.row(context, continuation, example.place)
                          for example, prompt in zip(examples, prompts, strict=True)
                          for context, continuation in requests(example, prompt)), strict=True)
        # Rows of one length together over the whole task, not only within what is handed over at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
        by_length = score_rows(scorer, [rows[i] for i in order], path.name, options.show_progress)
        answers = dict(zip(order, by_length, strict=True))
        values: list[dict[str, float]] = []
        truncated = first = 0
        for example in examples:
            places = range(first, first + example.choices)
            values.append(judge(example, [answers[i] for i in places]))
            truncated += any(cut[i] for i in places)
            first += example.choices
        tokens = sum(len(answer.logprobs) for answer in by_length)
        return TaskResult(self._metrics(examples, values), len(examples), "examples", truncated,
                          f"{self.protocol}; {shown}", {"scored_tokens": tokens, "rows": len(rows)})

    def questions(self, path: Path, options: EvalOptions) -> tuple[list[Example], list[str], str]:
        """The questions, what comes before each, and how to say what that is."""
        examples = [self.example(record) for record in self.records(path, options.limit)]
        prompts, shown = self._prompts(path, examples, options)
        return examples, prompts, shown

    def _metrics(self, examples: list[Example], values: list[dict[str, float]]) -> dict[str, Metric]:
        if not self.by_group:
            return {name: mean_and_stderr([value[name] for value in values]) for name in self.metrics}
        groups = list(dict.fromkeys(example.group for example in examples))
        name = self.metrics[0]
        each = {group: mean_and_stderr([value[name] for example, value in zip(examples, values, strict=True)
                                        if example.group == group]) for group in groups}
        whole = mean_of_means(list(each.values()))
        return {name: whole, **({f"{name}:{group}": metric for group, metric in each.items()} if len(each) > 1 else {})}

    def _prompts(self, path: Path, examples: list[Example], options: EvalOptions) -> tuple[list[str], str]:
        """What comes before each question, and how to say so."""
        count = options.num_fewshot
        if count == 0 or not self.fewshot:
            return [""] * len(examples), "zero-shot"
        source = self._training_file(path)
        pool = [self.example(record) for record in self.records(source or path, None)]
        if len(pool) <= count:
            raise ConfigError(f"--num-fewshot = {count}: {source or path} has {len(pool)} examples; choose fewer")
        random = Random(FEWSHOT_SEED)
        prompts = []
        for example in examples:
            spare = source is None or self.draws_a_spare
            drawn = [other for other in random.sample(pool, count + spare) if source is not None or other != example]
            drawn = drawn[:count]
            prompts.append("".join(other.solved() + FEWSHOT_DELIMITER for other in drawn))
        return prompts, f"{count}-shot, drawn from {_described(source or path)}"

    def _training_file(self, path: Path) -> Path | None:
        candidates = (path.parent / (name + suffix) for name in self.training for suffix in PACKED_SUFFIXES)
        return next((candidate for candidate in candidates if candidate.is_file()), None)


def _described(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.name} (SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()})"


def requests(example: Example, prompt: str = "") -> list[tuple[str, str]]:
    """What the model is asked: a context and what might follow, for each choice."""
    return [(prompt + context, DELIMITER + continuation) for context, continuation in example.pairs()]


def judge(example: Example, answers: Sequence[ScoredRow]) -> dict[str, float]:
    """What the model's answer to a question is worth, by metric."""
    scores = [answer.logprob for answer in answers]
    chosen = _first_largest(scores)
    lengths = [len(continuation) for _, continuation in example.pairs()]
    per_character = _first_largest([score / length for score, length in zip(scores, lengths, strict=True)])
    worth = {name: each[chosen] for name, each in example.credits.items()}
    return {
        "acc": float(chosen in example.gold), "acc_norm": float(per_character in example.gold),
        "exact_match": float(any(bool(answers[i].greedy.all()) for i in example.gold)), **worth,
    }


def _first_largest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def mean_of_means(parts: Sequence[Metric]) -> Metric:
    """The mean of independent means, each of which counts the same."""
    value = sum(part.value for part in parts) / len(parts)
    errors = [part.stderr for part in parts if part.stderr is not None]
    if len(errors) < len(parts):
        return Metric(value)
    return Metric(value, sum(error * error for error in errors) ** 0.5 / len(parts))
