"""LAMBADA: predict the last word of a passage (https://arxiv.org/abs/1606.06031).

The file holds {"text": passage} a line; the last word is everything after the last space. Any file of this
form will do. Scores are those of lm-evaluation-harness's `lambada_openai`: a passage counts as right when
every token of the last word is the model's first choice, and the perplexity is of whole words, exp(-mean log
p(word)).
"""

import math
from itertools import compress
from pathlib import Path

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.lm_eval.requests import TokenScorer, score_rows
from megatron_ltd.lm_eval.results import EvalOptions, Metric, TaskResult, aligned, mean_and_stderr, perplexity
from megatron_ltd.lm_eval.rows import Encoded, RowEncoder
from megatron_ltd.lm_eval.tasks.records import Record
from megatron_ltd.lm_eval.tasks.task_files import read_json_lines

FILES = ("lambada/lambada_test.jsonl",)
PROTOCOL = "last word after the last space, greedy match of all its tokens, as lm-evaluation-harness lambada_openai"


def last_word_row(passage: Record, encoder: RowEncoder) -> Encoded:
    """The row that scores the passage's last word.

    Raises:
        DataError: the passage has no context or no last word.
    """
    context, space, word = passage.text("text").rpartition(" ")
    if not context.strip() or not word:
        raise passage.error(f"text = {passage.text('text')[-40:]!r} must end in a space and a last word, with a "
                            "context before them")
    return encoder.pair(context, space + word, passage.place)


def evaluate(path: Path, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> TaskResult:
    """Last-word accuracy and perplexity of the passages in `path`."""
    encoder = RowEncoder(tokenizer, scorer.max_length, options.bos, options.overlong)
    encoded = [[last_word_row(passage, encoder)] for passage in read_json_lines(path, options.limit)]
    notes = encoder.notes(encoded)
    kept = encoder.fits(encoded, path.name)
    passages = [one for [one] in compress(encoded, kept)]
    answers = score_rows(scorer, [passage.row for passage in passages], "lambada", options.show_progress)
    hits, logprobs = [float(answer.greedy.all()) for answer in answers], [answer.logprob for answer in answers]
    return TaskResult(
        metrics={"accuracy": mean_and_stderr(hits), "perplexity": word_perplexity(logprobs)},
        n=len(passages),
        unit="passages",
        truncated=sum(passage.cut for passage in passages),
        protocol=PROTOCOL,
        counts={"scored_tokens": sum(len(answer.logprobs) for answer in answers)},
        notes=notes,
        samples={"accuracy": aligned(hits, kept), "perplexity": aligned(logprobs, kept)},
    )


def word_perplexity(logprobs: list[float]) -> Metric:
    """exp(-mean), with the mean's standard error carried through the exponential to first order."""
    mean = mean_and_stderr(logprobs)
    value = perplexity(-math.fsum(logprobs), len(logprobs))
    return Metric(value, None if mean.stderr is None else value * mean.stderr)
