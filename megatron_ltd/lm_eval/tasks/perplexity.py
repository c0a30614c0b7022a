"""Perplexity of any corpus: .jsonl with a document {"text"} a line, or .txt as one document, packed or not.

Each document stands alone, and its first token is predicted from the end-of-document token; the end of a
document is not predicted. Documents longer than the model are cut into windows that predict every token once.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.requests import ScoredRow, TokenScorer, score_rows
from megatron_ltd.lm_eval.results import EvalOptions, Metric, TaskResult, bits_per, perplexity
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
    rows = [row for tokens in tokenizer.encode_batch(documents) for row in encoder.windows(tokens, options.stride)]
    if not rows:
        raise DataError(f"{path} gives no tokens. Check that the tokenizer is the model's.")
    answers = score_rows(scorer, rows, "perplexity", options.show_progress)
    size_bytes = sum(len(document.encode()) for document in documents)
    metrics, tokens = perplexities(answers, {"byte": size_bytes})
    windows = "rolling windows" if options.stride is None else f"sliding windows of stride {options.stride}"
    return TaskResult(metrics, len(documents), "documents", truncated=0,
                      protocol=f"document by document from the end-of-document token, {windows}",
                      counts={"tokens": tokens, "bytes": size_bytes}, notes=notes)


def perplexities(answers: Sequence[ScoredRow], counts: dict[str, int]) -> tuple[dict[str, Metric], int]:
    """Perplexities per word (if counted), token and byte, and bits per byte; also the number of scored tokens.

    Args:
        counts: of "byte", and of "word" if that is to be reported.
    """
    nll = -math.fsum(answer.logprob for answer in answers)
    counts = counts | {"token": sum(len(answer.logprobs) for answer in answers)}
    metrics = {f"{unit}_perplexity": Metric(perplexity(nll, counts[unit]))
               for unit in ("word", "token", "byte") if unit in counts}
    return metrics | {"bits_per_byte": Metric(bits_per(nll, counts["byte"]))}, counts["token"]
