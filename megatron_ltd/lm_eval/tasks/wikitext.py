"""WikiText: perplexity of Wikipedia articles (https://arxiv.org/abs/1609.07843), by one of two protocols.

- By article (default), as lm-evaluation-harness: each article alone, its first token predicted from the
  end-of-document token, rolling windows. Words are those of the original split at white space, without line
  ends (counted as the harness does, an article's outer white space included).
- As a stream, with `--overlapping-eval STRIDE`, as Megatron-LM's WIKITEXT103: the whole file as one text,
  sliding windows, its first token not predicted. Words are those of the original split at single spaces, line
  ends included, less one; the word perplexity is Megatron-LM's "adjusted ppl".

The file is the raw text with its ` @-@ ` and spaced punctuation, which are undone before tokenizing.
"""

import re
from itertools import chain
from pathlib import Path

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.requests import TokenScorer, score_rows
from megatron_ltd.lm_eval.results import EvalOptions, TaskResult
from megatron_ltd.lm_eval.rows import RowEncoder, sliding_windows
from megatron_ltd.lm_eval.tasks.perplexity import by_text, perplexities
from megatron_ltd.lm_eval.tasks.task_files import read_text

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
    text, notes = read_text(path)
    articles = split_articles(text)[:options.limit]
    if not articles:
        raise DataError(f"{path} has no text. The task needs WikiText's raw file, such as wiki.test.raw.")
    if options.stride is None:
        encoder = RowEncoder(tokenizer, scorer.max_length, options.bos)
        rows_of = [list(encoder.windows(tokenizer.encode(detokenize(article)))) for article in articles]
        words = list(map(harness_words, articles))
        sizes = [len(article.encode()) for article in articles]
        protocol = BY_ARTICLE
    else:
        stream = text if options.limit is None else "\n".join(articles)
        rows_of = [list(sliding_windows(tokenizer.encode(detokenize(stream)), scorer.max_length, options.stride))]
        words = [megatron_words(stream)]
        sizes = [sum(len(article.encode()) for article in articles)]
        protocol = AS_STREAM.format(stride=options.stride)
    rows = list(chain.from_iterable(rows_of))
    if not rows or not sum(words):
        raise DataError(f"{path} has too little text to predict a word of. Use the whole file or a larger --limit.")
    texts = by_text(rows_of, score_rows(scorer, rows, "wikitext", options.show_progress))
    metrics, tokens, samples = perplexities(texts, {"word": words, "byte": sizes})
    counts = {"tokens": tokens, "words": sum(words), "bytes": sum(sizes)}
    return TaskResult(metrics, len(articles), "articles", truncated=0, protocol=protocol, counts=counts,
                      notes=notes, samples=samples)
