"""Perplexity of any corpus: .jsonl with a document {"text"} a line, or .txt as one document, packed or not.

Each document stands alone, and its first token is predicted from the end-of-document token; the end of a
document is not predicted. Documents longer than the model are cut into windows that predict every token once.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.requests import ScoredRow, ScoreRow, TokenScorer, score_rows
from megatron_ltd.lm_eval.results import EvalOptions, Metric, Samples, TaskResult, bits_per, perplexity
from megatron_ltd.lm_eval.rows import RowEncoder
from megatron_ltd.lm_eval.tasks.task_files import plain_suffix, read_json_lines, read_text

FILES: tuple[str, ...] = ()
"""No file of its own: `--tasks perplexity=PATH`."""


def read_documents(path: Path, limit: int | None) -> tuple[list[str], tuple[str, ...]]:
    """The documents of a corpus file, and what had to be changed in it.

    Raises:
        DataError: another kind of file, or no text.
    """
    suffix = plain_suffix(path)
    notes: tuple[str, ...] = ()
    if suffix in (".jsonl", ".json"):
        documents = [record.text("text") for record in read_json_lines(path, limit)]
    elif suffix == ".txt":
        text, notes = read_text(path)
        documents = [text]
    else:
        raise DataError(f"{path} has the suffix {suffix!r}. Perplexity reads .jsonl and .txt, also with .gz or .zst.")
    documents = [document for document in documents if document]
    if not documents:
        raise DataError(f"{path} has no text. Name a file with at least one document.")
    return documents, notes


def evaluate(path: Path, scorer: TokenScorer, tokenizer: Tokenizer, options: EvalOptions) -> TaskResult:
    """Token and byte perplexity of the documents in `path`."""
    documents, notes = read_documents(path, options.limit)
    encoder = RowEncoder(tokenizer, scorer.max_length, options.bos)
    windows_of = [list(encoder.windows(tokens, options.stride)) for tokens in tokenizer.encode_batch(documents)]
    rows = list(chain.from_iterable(windows_of))
    if not rows:
        raise DataError(f"{path} gives no tokens. Check that the tokenizer is the model's.")
    texts = by_text(windows_of, score_rows(scorer, rows, "perplexity", options.show_progress))
    sizes = {"byte": [len(document.encode()) for document in documents]}
    metrics, tokens, samples = perplexities(texts, sizes)
    windows = "rolling windows" if options.stride is None else f"sliding windows of stride {options.stride}"
    return TaskResult(metrics, len(documents), "documents", truncated=0,
                      protocol=f"document by document from the end-of-document token, {windows}",
                      counts={"tokens": tokens, "bytes": sum(sizes["byte"])}, notes=notes, samples=samples)


def by_text(rows: Sequence[Sequence[ScoreRow]], answers: Sequence[ScoredRow]) -> list[list[ScoredRow]]:
    """The answers to the rows of each text."""
    each = iter(answers)
    return [[next(each) for _ in of_text] for of_text in rows]


def perplexities(texts: Sequence[Sequence[ScoredRow]], sizes: Mapping[str, Sequence[int]],
                 ) -> tuple[dict[str, Metric], int, dict[str, Samples]]:
    """Perplexities per word (if counted), token and byte, and bits per byte; the number of scored tokens; and what each
    text adds.

    Args:
        texts: the rows of each.
        sizes: of each text in "byte", and in "word" if that is to be reported.
    """
    logprobs = [math.fsum(answer.logprob for answer in rows) for rows in texts]
    nll = -math.fsum(answer.logprob for rows in texts for answer in rows)
    sizes = {**sizes, "token": [sum(len(answer.logprobs) for answer in rows) for rows in texts]}
    of_metric = {f"{unit}_perplexity": unit for unit in ("word", "token", "byte") if unit in sizes}
    metrics = {name: Metric(perplexity(nll, sum(sizes[unit]))) for name, unit in of_metric.items()}
    of_metric["bits_per_byte"] = "byte"
    samples: dict[str, Samples] = {
        name: [[logprob, float(size)] for logprob, size in zip(logprobs, sizes[unit], strict=True)]
        for name, unit in of_metric.items()}
    return metrics | {"bits_per_byte": Metric(bits_per(nll, sum(sizes["byte"])))}, sum(sizes["token"]), samples
