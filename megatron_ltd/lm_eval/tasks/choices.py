"""Tasks that ask which of several texts is the most probable: one machinery, a reader for each task.

    multiple choice      one context, a continuation for each choice
    partial evaluation   a context for each choice, one continuation (https://arxiv.org/abs/1806.02847)
    minimal pairs        no context, the choices are whole sentences

Scores are lm-evaluation-harness's: `acc` takes the choice of the largest log-probability, `acc_norm` of the largest per
character of the choice; the first of equals. `exact_match` asks whether a right choice is what the model would say.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from random import Random

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.requests import ScoredRow, TokenScorer, score_by_length
from megatron_ltd.lm_eval.results import EvalOptions, Metric, TaskResult, aligned, mean_and_stderr
from megatron_ltd.lm_eval.rows import RowEncoder
from megatron_ltd.lm_eval.tasks.records import Record
from megatron_ltd.lm_eval.tasks.task_files import first_packed, read_records, sha256_of

DELIMITER = " "
"""Between context and continuation."""
FEWSHOT_DELIMITER = "\n\n"
FEWSHOT_SEED = 1234
"""lm-evaluation-harness's, whose draws these are where the examples come from a file of their own."""


@dataclass(frozen=True)
class Example:
    """A question.

    Args:
        pairs: context and continuation of each choice.
        gold: the right choices.
        group: the part of the task it belongs to.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: frozenset[int]
    place: str
    group: str = ""

    def solved(self) -> str:
        """The question with its answer, as an example to learn from."""
        context, continuation = self.pairs[min(self.gold)]
        return context + DELIMITER + continuation


def question(record: Record, pairs: Sequence[tuple[str, str]], gold: Iterable[int]) -> Example:
    """An example whose parts are checked.

    Raises:
        DataError: a right choice does not exist, or a continuation is empty.
    """
    example = Example(tuple(pairs), frozenset(gold), record.place, record.group)
    if not all(0 <= right < len(pairs) for right in example.gold):
        raise record.error(f"the answer is choice {max(example.gold) + 1} of {len(pairs)}")
    if not all(continuation for _, continuation in pairs):
        raise record.error("a choice is empty")
    return example


def choose(record: Record, context: str, choices: Sequence[str], gold: int) -> Example:
    """A multiple-choice question."""
    return question(record, [(context, choice) for choice in choices], [gold])


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
        encoder = RowEncoder(tokenizer, scorer.max_length, options.bos, options.overlong)
        encoded = [[encoder.pair(context, continuation, example.place)
                    for context, continuation in requests(example, prompt)]
                   for example, prompt in zip(examples, prompts, strict=True)]
        notes, kept = encoder.notes(encoded), encoder.fits(encoded, path.name)
        examples, encoded = list(compress(examples, kept)), list(compress(encoded, kept))
        rows = [one.row for pairs in encoded for one in pairs]
        answers = score_by_length(scorer, rows, path.name, options.show_progress)
        each = iter(answers)
        values = [judge(example, [next(each) for _ in example.pairs]) for example in examples]
        truncated = sum(any(one.cut for one in pairs) for pairs in encoded)
        tokens = sum(len(answer.logprobs) for answer in answers)
        samples = {name: aligned([value[name] for value in values], kept) for name in self.metrics}
        return TaskResult(self._metrics(examples, values), len(examples), "examples", truncated,
                          f"{self.protocol}; {shown}", {"scored_tokens": tokens, "rows": len(rows)}, notes, samples,
                          options.num_fewshot if self.fewshot else 0)

    def questions(self, path: Path, options: EvalOptions) -> tuple[list[Example], list[str], str]:
        """The questions, the solved examples before each as one text, and a description of those.

        Raises:
            DataError: an example is malformed.
            ConfigError: there are too few examples to show so many.
        """
        examples, count = [self.example(record) for record in self.records(path, options.limit)], options.num_fewshot
        if count == 0 or not self.fewshot:
            return examples, [""] * len(examples), "zero-shot"
        training = first_packed(path.parent / name for name in self.training)
        source = training or path
        pool = [self.example(record) for record in self.records(source, None)]
        if len(pool) <= count:
            raise ConfigError(f"--num-fewshot = {count}: {source} has {len(pool)} examples; choose fewer")
        random, spare = Random(FEWSHOT_SEED), training is None or self.draws_a_spare
        prompts = []
        for example in examples:
            drawn = random.sample(pool, count + spare)
            if training is None:
                drawn = [other for other in drawn if other != example]
            prompts.append("".join(other.solved() + FEWSHOT_DELIMITER for other in drawn[:count]))
        return examples, prompts, f"{count}-shot, drawn from {source.name} (SHA-256 {sha256_of(source)})"

    def _metrics(self, examples: list[Example], values: list[dict[str, float]]) -> dict[str, Metric]:
        if not self.by_group:
            return {name: mean_and_stderr([value[name] for value in values]) for name in self.metrics}
        groups = list(dict.fromkeys(example.group for example in examples))
        name = self.metrics[0]
        each = {group: mean_and_stderr([value[name] for example, value in zip(examples, values, strict=True)
                                        if example.group == group]) for group in groups}
        whole = mean_of_means(list(each.values()))
        return {name: whole, **({f"{name}:{group}": metric for group, metric in each.items()} if len(each) > 1 else {})}


def requests(example: Example, prompt: str = "") -> list[tuple[str, str]]:
    """What the model is asked: a context and what might follow, for each choice."""
    return [(prompt + context, DELIMITER + continuation) for context, continuation in example.pairs]


def judge(example: Example, answers: Sequence[ScoredRow]) -> dict[str, float]:
    """What the model's answer to a question is worth, by metric."""
    scores = [answer.logprob for answer in answers]
    chosen = _first_largest(scores)
    lengths = [len(continuation) for _, continuation in example.pairs]
    per_character = _first_largest([score / length for score, length in zip(scores, lengths, strict=True)])
    return {
        "acc": float(chosen in example.gold), "acc_norm": float(per_character in example.gold),
        "exact_match": float(any(bool(answers[i].greedy.all()) for i in example.gold)),
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
