"""What the tool says of a corpus is what is in it."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.corpora import random_documents, write_corpus, write_sentences
from tools import inspect_dataset


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert inspect_dataset.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_counts_lengths_and_ids_are_those_of_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sentences(tmp_path / "c", [[[5, 6, 7], [8]], [], [[9] * 600, [3]], [[900]]], 1000)
    said = inspect(capsys, "--data-path", tmp_path / "c", "--verify")
    for line in ("documents       4, 1 of them without a token", "sequences       5",
                 "tokens          606 of type uint16, 0.0 MB", "token ids       3 to 900\n",
                 "in a document   mean 151.5, median 2, 90% up to 422, longest 601",
                 "in a sequence   mean 121.2, median 1, 90% up to 361, longest 600",
                 "2 documents of two sentences or more; 1 are left out for a sentence of more than 512 tokens"):
        assert line in said
    rows = [line.split() for line in said.splitlines() if "#" in line]
    assert [row[:-2] + row[-2:-1] for row in rows] == [["0", "1"], ["1", "1"], ["4", "to", "7", "1"],
                                                       ["512", "to", "1,023", "1"]]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_every_length_falls_into_its_class(lengths: list[int]) -> None:
    classes = inspect_dataset.length_classes(np.array(lengths))
    for shortest, longest, count in classes:
        assert count == sum(shortest <= length <= longest for length in lengths)
    assert sum(count for _, _, count in classes) == len(lengths)
    assert all(after[0] == before[1] + 1 for before, after in zip(classes, classes[1:], strict=False))


def test_documents_are_shown_as_ids_or_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sentences(tmp_path / "c", [[[5, 6], [7]], []], 1000)
    arguments = ["--data-path", tmp_path / "c", "--documents", 0, 1]
    plain = inspect(capsys, *arguments)
    assert "document 0, sequences 0 to 1\n    '5 6'\n    '7'" in plain and "document 1: no sequence" in plain
    assert plain == inspect(capsys, *arguments, "--tokenizer-type", "NullTokenizer", "--vocab-size", 999)


def test_a_histogram_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        write_corpus(tmp_path / name, random_documents(1, 40, 90, 500), 500)
    output = tmp_path / "h.png"
    said = inspect(capsys, "--data-path", tmp_path / "a", tmp_path / "b", "--histogram", output)
    assert f"Drew {output}." in said
    header = output.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", header[16:])) > 300


def test_a_corpus_without_documents_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "c", [], 100)
    said = inspect(capsys, "--data-path", tmp_path / "c", "--verify")
    assert "documents       0" in said and "in a document   none" in said


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--documents", "3"], 20, "--documents = 3: "),
    (["--histogram", "h.gif"], 20, "--output = h.gif: choose a name that ends in .png"),
    (["--tokenizer-type", "Other"], 20, "--tokenizer-type = Other: choose one of"),
    (["--verify", "--tokenizer-type", "NullTokenizer", "--vocab-size", "6"], 21,
     "holds token id = 7, and the tokenizer has ids in [0, 7)"),
    (["--histogram", "nowhere/h.png"], 21, "--output = nowhere/h.png cannot be written"),
])
def test_what_cannot_be_done_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
                                          code: int, words: str) -> None:
    write_corpus(tmp_path / "c", [[5, 6, 7]], 1000)
    assert inspect_dataset.main(["--data-path", str(tmp_path / "c"), *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_damaged_corpus_is_refused_with_file_and_offset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "c", [[5, 6, 7]], 1000)
    (tmp_path / "c.bin").write_bytes(b"12345")
    assert inspect_dataset.main(["--data-path", str(tmp_path / "c")]) == 21
    assert "c.bin, byte 5: expected a file of 6 bytes" in capsys.readouterr().err
