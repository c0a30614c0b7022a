"""Perplexity of a corpus, by documents."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
import zstandard

from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.lm_eval.results import EvalOptions
from megatron_ltd.lm_eval.tasks import perplexity
from tests.lm_eval.fakes import UniformScorer, WordTokenizer
from tests.lm_eval.gpt2_scorer import EOD, Gpt2Scorer, gpt2_tokenizer, tiny_gpt2

DOCUMENTS = ["a b c d e f g h i j", "é k", ""]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


def test_tokens_and_bytes_are_counted_over_documents_with_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS))
    result = perplexity.evaluate(path, UniformScorer(max_length=4), WordTokenizer(), EvalOptions())
    assert (result.n, result.counts) == (2, {"tokens": 12, "bytes": 19 + 4})
    assert result.metrics["token_perplexity"].value == pytest.approx(8)
    assert result.metrics["byte_perplexity"].value == pytest.approx(8 ** (12 / 23))
    assert result.metrics["bits_per_byte"].value == pytest.approx(3 * 12 / 23)


def test_a_document_within_the_positions_has_the_loss_of_one_forward_pass(tmp_path: Path, shared_data: Path) -> None:
    tokenizer, model = gpt2_tokenizer(shared_data), tiny_gpt2()
    path = tmp_path / "a.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n")
    result = perplexity.evaluate(path, Gpt2Scorer(model), tokenizer, EvalOptions())
    tokens = torch.tensor([[EOD, *tokenizer.encode(path.read_text())]])
    with torch.no_grad():
        loss = float(model(tokens, labels=tokens).loss)
    assert math.log(result.metrics["token_perplexity"].value) == pytest.approx(loss, rel=1e-5)


def test_overlapping_windows_give_every_later_token_more_context(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS))
    scorer = UniformScorer(max_length=4)
    result = perplexity.evaluate(path, scorer, WordTokenizer(), EvalOptions(stride=1))
    assert [(len(row.tokens), row.first_scored) for row in scorer.rows] == [(5, 1)] + 6 * [(5, 4)] + [(3, 1)]
    assert result.counts["tokens"] == 12


PLAIN = jsonl(DOCUMENTS)


@pytest.mark.parametrize(
    ("suffix", "data"),
    [("", PLAIN), (".gz", gzip.compress(PLAIN)), (".zst", zstandard.ZstdCompressor().compress(PLAIN))],
    ids=["plain", "gz", "zst"],
)
def test_packed_and_plain_files_hold_the_same_documents(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data)
    assert perplexity.read_documents(path, None) == (DOCUMENTS[:2], ())


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n\ntwo\n"))
    assert perplexity.read_documents(path, 1) == (["one\n\ntwo\n"], ())


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'\.bin'.*\.jsonl and \.txt"):
        perplexity.read_documents(tmp_path / "corpus.bin", None)


def test_documents_without_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["", ""]))
    with pytest.raises(DataError, match="has no text"):
        perplexity.read_documents(path, None)


def test_a_stride_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(DOCUMENTS))
    with pytest.raises(ConfigError, match="--overlapping-eval = 5"):
        perplexity.evaluate(path, UniformScorer(max_length=4), WordTokenizer(), EvalOptions(stride=5))
