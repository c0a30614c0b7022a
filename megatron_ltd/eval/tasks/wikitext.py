"""WikiText: perplexity of Wikipedia articles (https://arxiv.org/abs/1609.07843), by one of two protocols.

- By article (default), as lm-evaluation-harness: each article alone, its first token predicted from the
  end-of-document token, rolling windows. Words are those of the original split at white space, without line
  ends (counted as the harness does, an article's outer white space included).
- As a stream, with `--overlapping-eval STRIDE`, as Megatron-LM's WIKITEXT103: the whole file as one text,
  sliding windows, its first token not predicted. Words are those of the original split at single spaces, line
  ends included, less one; the word perplexity is Megatron-LM's "adjusted ppl".

The file is the raw text with its ` @-@ ` and spaced punctuation, which are undone before tokenizing.
"""

import math
import re
from pathlib import Path

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError
from megatron_ltd.eval.requests import ScoreRow, TokenScorer, score_rows
from megatron_ltd.eval.results import EvalOptions, Metric, TaskResult, bits_per, perplexity
from megatron_ltd.eval.tasks.task_files import read_text
from megatron_ltd.eval.windows import rolling_windows, sliding_windows

FILES = (
    "wikitext2/wiki.test.raw",
    "wikitext/wiki.test.raw",
    "wikitext-2-raw/wiki.test.raw",
    "wikitext-103-raw/wiki.test.raw",
)
BY_ARTICLE = "article by article from the end-of-document token, rolling windows, as lm-evaluation-harness wikitext"
AS_STREAM = "one stream, sliding windows of stride {stride}, first token not predicted, as Megatron-LM WIKITEXT103"


def detokenize(text: str) -> str:
    """Undo WikiText's tokenization, by the rules that published word perplexities of GPT models rest on."""
    text = text.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        inside = rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"
        text = re.sub(inside, rf"{left}\1{right}", text)
    for depth in (4, 3, 2):
        text = text.replace(" ".join("=" * depth), "=" * depth)
    # " N " -> " 1 " comes from another corpus' number token, and changes compass points here: kept, to be comparable.
    for old, new in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(old, new)
    return text


def split_articles(text: str) -> list[str]:
    """The articles of a file, each beginning with its title line ` = Title = ` (a section's is ` = = Name = = `)."""
    articles: list[list[str]] = [[]]
    for line in text.split("\n"):
        if re.fullmatch(r"= (?!=).*(?<!=) =", line.strip()):
            articles.append([])
        articles[-1].append(line)
    return [article for article in map("\n".join, articles) if article.strip()]


def harness_words(article: str) -> int:
    """Words of an original article; white space at either end counts as one more, as published numbers have it."""
    return len(re.split(r"\s+", article))


def megatron_words(stream: str) -> int:
    """Words and line ends of an original file, less the first, which is not predicted."""
    return len(stream.strip().split(" ")) - 1


def evaluate(path: Path, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> TaskResult:
    """Word, token and byte perplexity of the file in `path`.

    Raises:
        DataError: the file is empty, or holds nothing to predict.
    """
    text = read_text(path)
    articles = split_articles(text)[:options.limit]
    if not articles:
        raise DataError(f"{path} has no text. The task needs WikiText's raw file, such as wiki.test.raw.")
    first = tokenizer.eod if options.bos is None else options.bos
    if options.stride is None:
        rows = [
            row
            for article in articles
            for row in rolling_windows([first, *tokenizer.encode(detokenize(article))], scorer.max_length)
        ]
        words = sum(map(harness_words, articles))
        protocol = BY_ARTICLE
    else:
        stream = text if options.limit is None else "\n".join(articles)
        tokens = tokenizer.encode(detokenize(stream))
        rows = list(sliding_windows(tokens, scorer.max_length, options.stride))
        words = megatron_words(stream)
        protocol = AS_STREAM.format(stride=options.stride)
    size_bytes = sum(len(article.encode()) for article in articles)
    metrics, tokens_scored = _perplexities(scorer, rows, words, size_bytes, options, path)
    counts = {"tokens": tokens_scored, "words": words, "bytes": size_bytes}
    return TaskResult(metrics, len(articles), "articles", truncated=0, protocol=protocol, counts=counts)


def _perplexities(
    scorer: TokenScorer, rows: list[ScoreRow], words: int, size_bytes: int, options: EvalOptions, path: Path
) -> tuple[dict[str, Metric], int]:
    if not rows or not words:
        raise DataError(f"{path} has too little text to predict a word of. Use the whole file or a larger --limit.")
    answers = score_rows(scorer, rows, "wikitext", options.show_progress)
    nll = -math.fsum(answer.logprob for answer in answers)
    tokens = sum(len(answer.logprobs) for answer in answers)
    metrics = {
        "word_perplexity": Metric(perplexity(nll, words)),
        "token_perplexity": Metric(perplexity(nll, tokens)),
        "byte_perplexity": Metric(perplexity(nll, size_bytes)),
        "bits_per_byte": Metric(bits_per(nll, size_bytes)),
    }
    return metrics, tokens
