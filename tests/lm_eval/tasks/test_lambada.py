"""The last word, its tokens, and its statistics, worked out by hand."""

import json
import math
from pathlib import Path

import pytest

from megatron_ltd.errors import DataError
from megatron_ltd.lm_eval.results import EvalOptions
from megatron_ltd.lm_eval.rows import RowEncoder
from megatron_ltd.lm_eval.tasks import lambada
from megatron_ltd.lm_eval.tasks.records import Record
from tests.lm_eval.fakes import UniformScorer, WordTokenizer
from tests.lm_eval.gpt2_scorer import gpt2_tokenizer


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_accuracy_perplexity_and_their_errors_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    tokenizer = WordTokenizer()
    path = write(tmp_path / "a.jsonl", ["one two", "one three", "one two", "two one"])
    knows = frozenset(tokenizer.encode("x two")[1:])
    result = lambada.evaluate(path, UniformScorer(vocab=8, knows=knows), tokenizer, EvalOptions())
    assert result.metrics["accuracy"].value == 0.5
    # Sample variance of (1, 0, 1, 0) is 1/3; its standard error sqrt(1/3 / 4).
    assert result.metrics["accuracy"].stderr == pytest.approx(math.sqrt(1 / 12))
    assert result.metrics["perplexity"].value == pytest.approx(8)
    assert result.metrics["perplexity"].stderr == pytest.approx(0, abs=1e-6)
    assert (result.n, result.truncated) == (4, 0)


def test_a_word_of_several_tokens_counts_only_when_all_of_them_are_right(shared_data: Path) -> None:
    tokenizer = gpt2_tokenizer(shared_data)
    row, *_ = lambada.last_word_row(Record({"text": "The dog was a Rottweiler"}, "f:1"), RowEncoder(tokenizer, 100))
    tokens = row.tokens[row.first_scored:]
    assert tokenizer.decode(tokens) == " Rottweiler" and len(tokens) > 1
    for known, expected in ((tokens, True), (tokens[:-1], False), (tokens[1:], False)):
        (answer,) = UniformScorer(knows=frozenset(known)).score([row])
        assert bool(answer.greedy.all()) == expected


def test_the_last_word_is_everything_after_the_last_space(shared_data: Path) -> None:
    tokenizer = gpt2_tokenizer(shared_data)
    passage = Record({"text": 'He said.\n\n"I do," said\nHelen'}, "f:1")
    row, *_ = lambada.last_word_row(passage, RowEncoder(tokenizer, 100))
    assert tokenizer.decode(row.tokens[row.first_scored:]) == " said\nHelen"


def test_spaces_before_the_last_one_are_scored_with_the_word(shared_data: Path) -> None:
    tokenizer = gpt2_tokenizer(shared_data)
    row, *_ = lambada.last_word_row(Record({"text": "He said   Helen"}, "f:1"), RowEncoder(tokenizer, 100))
    assert tokenizer.decode(row.tokens[:row.first_scored]) == "He said"
    assert tokenizer.decode(row.tokens[row.first_scored:]) == "   Helen"


def test_a_long_context_is_cut_on_the_left_and_counted(tmp_path: Path) -> None:
    tokenizer = WordTokenizer()
    scorer = UniformScorer(max_length=3)
    path = write(tmp_path / "a.jsonl", ["a b c d e f", "a b c d", "a b"])
    result = lambada.evaluate(path, scorer, tokenizer, EvalOptions())
    assert result.truncated == 1
    assert [tokenizer.decode(row.tokens) for row in scorer.rows] == [" c d e f", "a b c d", "a b"]
    assert [tokenizer.decode(row.tokens[row.first_scored:]) for row in scorer.rows] == [" f", " d", " b"]


def test_limit_scores_only_the_first_passages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a b", "a c", "a d"])
    result = lambada.evaluate(path, UniformScorer(), WordTokenizer(), EvalOptions(limit=2))
    assert result.n == 2


@pytest.mark.parametrize("text", ["word", "ends in a space ", "", " word", "\n\n word"])
def test_a_passage_without_context_or_last_word_names_its_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.jsonl", ["a good line", text])
    with pytest.raises(DataError, match=r"a\.jsonl:2: text = "):
        lambada.evaluate(path, UniformScorer(), WordTokenizer(), EvalOptions())


def test_of_a_last_word_longer_than_the_model_the_last_tokens_are_scored(shared_data: Path) -> None:
    text, tokenizer = "A long word is Donaudampfschifffahrtsgesellschaft", gpt2_tokenizer(shared_data)
    row, cut, _ = lambada.last_word_row(Record({"text": text}, "f.jsonl:7"), RowEncoder(tokenizer, 4))
    assert (row.tokens, row.first_scored, cut) == (tokenizer.encode(text)[-5:], 1, True)
