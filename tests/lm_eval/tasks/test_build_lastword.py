"""Passages end in a word said before, and are the same for the same documents."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.tasks.build_lastword import (
    FUNCTION_WORDS,
    LastWordOptions,
    build_lastword_set,
    passages_of,
    sentence_spans,
    target_word,
)
from megatron_ltd.lm_eval.tasks.task_files import read_json_lines
from tools import make_lastword_set

SMALL = LastWordOptions(min_words=6, max_words=30)


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


def test_sentences_end_at_marks_with_their_quotes_and_at_paragraphs_but_not_at_titles() -> None:
    text = 'Mr. Smith saw J. Brown. "Come in!" he said.  Pi is 3.14 now?\n\nA heading\nThe end.'
    assert sentences(text) == [
        "Mr. Smith saw J. Brown.", '"Come in!"', "he said.", "Pi is 3.14 now?", "A heading", "The end."
    ]


def test_a_passage_ends_with_the_repeated_word_without_its_full_stop() -> None:
    document = 'The fox lived in an old wood. It was quiet there. Nobody else knew about the wood." Then it left.'
    assert list(passages_of(document, SMALL)) == [
        "The fox lived in an old wood. It was quiet there. Nobody else knew about the wood"
    ]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("He saw the dog.", "dog"),
        ('"He saw the Dog?!"', "Dog"),
        ("He saw the cat.", None),
        ("He saw all of them.", None),
        ("He saw 42.", None),
        ("dog.", None),
        ('He called it "dog"', None),
        ("It was a bull-dog.", None),
    ],
)
def test_a_target_is_a_bare_content_word_of_the_context(sentence: str, expected: str | None) -> None:
    assert target_word("The dog is not like them. It is 42. ", sentence) == expected


def test_no_passage_runs_across_a_heading() -> None:
    assert list(passages_of("The fox lived in an old wood.\nA heading\nNobody else knew about the wood.", SMALL)) == []


@given(st.lists(st.sampled_from("ab The fox. wood wood. \n\n said \"No.\" Mr. x! ? , 3.1".split(" ")), max_size=150))
def test_every_passage_keeps_the_promises_of_the_form(words: list[str]) -> None:
    document = " ".join(words)
    passages = list(passages_of(document, SMALL))
    at = 0
    for passage in passages:
        context, _, last = passage.rpartition(" ")
        assert re.fullmatch(r"[A-Za-z'-]{3,}", last) and last.lower() not in FUNCTION_WORDS
        assert last.lower() in context.lower()
        assert SMALL.min_words < len(passage.split()) <= SMALL.max_words
        at = document.index(passage, at) + len(passage)


def test_the_choice_does_not_depend_on_the_order_of_documents_and_changes_with_the_seed() -> None:
    documents = [f"Item {n} is a big red stone {n} here. We all like a stone." for n in range(40)]
    first = build_lastword_set(documents, LastWordOptions(6, 30, count=10))
    assert len(first) == 10
    assert sorted(build_lastword_set(documents[::-1], LastWordOptions(6, 30, count=10))) == sorted(first)
    assert build_lastword_set(documents, LastWordOptions(6, 30, count=10, seed=2)) != first
    assert first == sorted(first, key=lambda passage: int(passage.split()[1]))


def test_repeated_passages_are_kept_once() -> None:
    assert len(build_lastword_set(["A big red stone lay here. We all like a stone."] * 3, SMALL)) == 1


@pytest.mark.parametrize("options", [{"min_words": 0}, {"min_words": 120}, {"count": 0}])
def test_options_that_allow_no_passage_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="= (0|120) must be at least 1"):
        LastWordOptions(**options)


def test_the_tool_writes_the_same_bytes_twice_and_lambada_reads_them(tmp_path: Path, shared_data: Path) -> None:
    source = str(shared_data / "train" / "wiki.valid.jsonl.zst")
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        assert make_lastword_set.main(["--input", source, "--output", str(tmp_path / name), "--count", "20"]) == 0
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    held = [json.loads(line) for line in gzip.open(tmp_path / "a.jsonl.gz", "rt", encoding="utf-8")]
    assert len(held) == 20 and len(read_json_lines(tmp_path / "a.jsonl.gz")) == 20


@pytest.mark.parametrize(
    ("output", "message"), [("out.txt", "must end in .jsonl"), ("none/out.jsonl", "cannot be written")]
)
def test_the_tool_says_what_is_wrong_and_exits_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "too short"}\n')
    assert make_lastword_set.main(["--input", str(source), "--output", str(tmp_path / output)]) == 21
    assert message in capsys.readouterr().err


def test_a_set_that_cannot_be_written_is_told_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"text": "A big red stone lay here. We all like a stone."}))
    output.with_name("out.jsonl.partial").mkdir()
    assert make_lastword_set.main(["--input", str(source), "--output", str(output), "--min-words", "3"]) == 21
    told = capsys.readouterr().err
    assert f"--output = {output} cannot be written" in told and "Traceback" not in told


def test_text_without_passages_is_an_error_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "too short"}\n')
    assert make_lastword_set.main(["--input", str(source), "--output", str(output)]) == 21
    assert "smaller --min-words" in capsys.readouterr().err and not output.exists()
