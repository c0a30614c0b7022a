"""LAMBADA: predict the last word of a passage (https://arxiv.org/abs/1606.06031).

The file holds {"text": passage} a line; the last word is everything after the last space. Any file of this
form will do. Scores are those of lm-evaluation-harness's `lambada_openai`: a passage counts as right when
every token of the last word is the model's first choice, and the perplexity is of whole words, exp(-mean log
p(word)).
"""

import math
from pathlib import Path

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError
from megatron_ltd.eval.requests import ScoreRow, TokenScorer, score_rows
from megatron_ltd.eval.results import EvalOptions, Metric, TaskResult, mean_and_stderr, perplexity
from megatron_ltd.eval.tasks.task_files import TextLine, read_jsonl_texts

FILES = ("lambada/lambada_test.jsonl",)
PROTOCOL = "last word after the last space, greedy match of all its tokens, as lm-evaluation-harness lambada_openai"


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of context and continuation, cut where the context's own encoding ends.

    Spaces at the end of the context go to the continuation first, since tokens begin with their space.
    """
    bare = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    cut = len(tokenizer.encode(bare))
    return whole[:cut], whole[cut:]


def last_word_row(line: TextLine, tokenizer: Tokenizer, max_length: int,
                  bos: int | None = None) -> tuple[ScoreRow, bool]:
    """The row that scores the passage's last word, and whether its context was cut on the left.

    Raises:
        DataError: the passage has no context or no last word, or its last word does not fit the model.
    """
    context, space, word = line.text.rpartition(" ")
    if not context.strip() or not word:
        raise DataError(
            f"{line.place}: text = {line.text[-40:]!r} must end in a space and a last word, with a context before "
            "them. Mend or remove the line."
        )
    context_tokens, word_tokens = encode_pair(tokenizer, context, space + word)
    context_tokens = context_tokens if bos is None else [bos, *context_tokens]
    if not context_tokens or not 1 <= len(word_tokens) <= max_length:
        raise DataError(
            f"{line.place}: the last word {word!r} is {len(word_tokens)} tokens after a context of "
            f"{len(context_tokens)}; it must be 1 to {max_length} (the model's positions) after at least 1. Remove "
            "the line, or check that the tokenizer is the model's."
        )
    tokens = (context_tokens + word_tokens)[-(max_length + 1):]
    row = ScoreRow(tokens, first_scored=len(tokens) - len(word_tokens))
    return row, len(tokens) < len(context_tokens) + len(word_tokens)


def evaluate(path: Path, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> TaskResult:
    """Last-word accuracy and perplexity of the passages in `path`."""
    lines = read_jsonl_texts(path, options.limit)
    rows, cut = zip(*(last_word_row(line, tokenizer, scorer.max_length, options.bos) for line in lines), strict=True)
    answers = score_rows(scorer, list(rows), "lambada", options.show_progress)
    accuracy = mean_and_stderr([float(answer.greedy.all()) for answer in answers])
    return TaskResult(
        metrics={"accuracy": accuracy, "perplexity": word_perplexity([answer.logprob for answer in answers])},
        n=len(lines),
        unit="passages",
        truncated=sum(cut),
        protocol=PROTOCOL,
        counts={"scored_tokens": sum(len(answer.logprobs) for answer in answers)},
    )


def word_perplexity(logprobs: list[float]) -> Metric:
    """exp(-mean), with the mean's standard error carried through the exponential to first order."""
    mean = mean_and_stderr(logprobs)
    value = perplexity(-math.fsum(logprobs), len(logprobs))
    return Metric(value, None if mean.stderr is None else value * mean.stderr)
