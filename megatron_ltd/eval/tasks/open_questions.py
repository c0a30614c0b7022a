"""Questions without choices: WebQuestions, by whether a right answer is what the model would say, and TriviaQA, by what
it does say."""

import string
from pathlib import Path

from tqdm import tqdm

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.eval.requests import SLAB_ROWS, TokenScorer
from megatron_ltd.eval.results import EvalOptions, TaskResult, mean_and_stderr
from megatron_ltd.eval.tasks.choices import ChoiceTask, Example
from megatron_ltd.eval.tasks.records import Record

STOPS = ("\n", ".", ",")
"""An answer ends before the first of these."""
ANSWER_TOKENS = 256


def webqs(record: Record) -> Example:
    """A question of the web with all answers that count. One that begins with another counts as that one."""
    kept: list[str] = []
    for answer in sorted(record.texts("answers")):
        if not kept or not answer.startswith(kept[-1]):
            kept.append(answer)
    if not all(kept):
        raise record.error("an answer is empty")
    return Example((f"Question: {record.text('question')}\nAnswer:",), tuple(kept), frozenset(range(len(kept))),
                   record.place)


def triviaqa(record: Record) -> Example:
    """A trivia question with all names of its answer."""
    aliases = record.part("answer").texts("aliases")
    return Example((f"Question: {record.text('question')}?\nAnswer:",), tuple(aliases), frozenset(range(len(aliases))),
                   record.place)


class AnswerTask(ChoiceTask):
    """A task whose answers are generated; right is what equals a given one but for case and punctuation."""

    def evaluate(self, path: Path, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> TaskResult:
        examples, prompts, shown = self.questions(path, options)
        first = [] if options.bos is None else [options.bos]
        texts = [first + tokenizer.encode(prompt + example.contexts[0])
                 for example, prompt in zip(examples, prompts, strict=True)]
        # Half of the positions at most, so that a question is left of what it is about.
        new_tokens = min(ANSWER_TOKENS, scorer.max_length // 2)

        def finished(tokens: list[int]) -> bool:
            return any(stop in tokenizer.decode(tokens) for stop in STOPS)

        answers: list[list[int]] = []
        with tqdm(total=len(texts), desc=path.name, unit="answer", disable=not options.show_progress) as bar:
            for start in range(0, len(texts), SLAB_ROWS):
                slab = texts[start:start + SLAB_ROWS]
                answers += scorer.generate(slab, new_tokens, tokenizer.eod, finished)
                bar.update(len(slab))
        hits = [float(compared(spoken(tokenizer.decode(answer))) in set(map(compared, example.continuations)))
                for example, answer in zip(examples, answers, strict=True)]
        cut = sum(len(text) > scorer.max_length - new_tokens for text in texts)
        return TaskResult({"exact_match": mean_and_stderr(hits)}, len(examples), "questions", cut,
                          f"greedy answers up to a new line, full stop or comma, {self.protocol}; {shown}",
                          {"generated_tokens": sum(map(len, answers))})


def spoken(text: str) -> str:
    """An answer without what comes after its end, and the space around it."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text.strip()


def compared(text: str) -> str:
    """A text without case and punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


TASKS = {
    "triviaqa": AnswerTask(("triviaqa/wikipedia-nocontext-dev.jsonl", "triviaqa/validation.jsonl"), triviaqa,
                           ("exact_match",), training=("train.jsonl",)),
    "webqs": ChoiceTask(("webqs/test.jsonl", "webqs/test.json"), webqs, ("exact_match",),
                        training=("train.jsonl", "train.json"), draws_a_spare=False),
}
