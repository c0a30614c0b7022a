"""A document too long for the format is refused while it is read, with its place; a shorter one is not."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.preprocess import documents, text_input
from megatron_ltd.data.preprocess.documents import sorted_documents
from megatron_ltd.data.preprocess.encoding import EncodingPlan
from megatron_ltd.data.preprocess.pipeline import preprocess
from megatron_ltd.data.preprocess.text_input import LARGEST_DOCUMENT_BYTES, Block, TextInput
from megatron_ltd.errors import DataError

LIMIT = 600_000
PLAN = EncodingPlan(DataConfig(tokenizer_type="NullTokenizer"), 1000)


@pytest.fixture(autouse=True)
def smaller_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (text_input, documents):
        monkeypatch.setattr(module, "LARGEST_DOCUMENT_BYTES", LIMIT)


def line(size_bytes: int) -> bytes:
    """An object of numbers of so many bytes, without a newline."""
    frame = len(json.dumps({"text": ""}))
    return json.dumps({"text": ("7 " * size_bytes)[:size_bytes - frame]}).encode()


@pytest.mark.parametrize("before", [0, 1, 300, 3000])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_is_refused_exactly_above_the_limit(tmp_path: Path, before: int, end: bytes) -> None:
    source = tmp_path / "in.jsonl"
    short = b'{"text": "1 2 3 %d"}'
    lines = [short % (i % 1000) for i in range(before)]
    source.write_bytes(b"".join(part + b"\n" for part in lines) + line(LIMIT) + end)
    preprocess(PLAN, [str(source)], str(tmp_path / "c"), 1, lambda progress: None)
    corpus = IndexedCorpus(str(tmp_path / "c_text_document"))
    assert len(corpus) == before + 1 and int(corpus.sequence_lengths[-1]) == (LIMIT - 11) // 2
    source.write_bytes(b"".join(part + b"\n" for part in lines) + line(LIMIT + 1) + end + b'{"text": "5"}')
    place = f"{source}:{before + 1}:{sum(len(part) + 1 for part in lines)}: a line of more than {LIMIT} bytes"
    with pytest.raises(DataError) as caught:
        preprocess(PLAN, [str(source)], str(tmp_path / "out" / "c"), 1, lambda progress: None)
    assert str(caught.value).startswith(place)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_without_a_newline_is_not_read_to_its_end(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b"x" * (50 * LIMIT), compresslevel=1))
    reader = TextInput(str(source))
    seen = []
    decompressed = reader._chunks
    reader._chunks = lambda: (seen.append(len(chunk)) or chunk for chunk in decompressed())  # type: ignore
    with pytest.raises(DataError, match="a line of more than"):
        list(reader.blocks())
    assert len(seen) <= 2 + LIMIT // min(seen)


def test_a_file_that_is_one_document_and_a_value_of_a_table_have_the_same_limit(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("7\n" * (LIMIT // 2))
    assert len(list(TextInput(str(source)).blocks())) == 1
    source.write_text("7\n" * (LIMIT // 2 + 1))
    with pytest.raises(DataError, match=rf"in\.txt:1:0: a document of more than {LIMIT} bytes"):
        list(TextInput(str(source)).blocks())
    rows = Block("t.parquet", 1, 0, b"", columns=(("a" * LIMIT, "é" * (LIMIT // 2 + 1), "a"),))
    texts, bad = sorted_documents(rows, ["text"])
    assert [len(text) for text in texts[0]] == [LIMIT, 1]
    assert [(one.line, one.problem) for one in bad] == [
        (2, f"more than {LIMIT} bytes under key 'text'; split the document")]


def test_the_limit_leaves_room_for_a_token_a_byte_and_an_end_of_document() -> None:
    assert LARGEST_DOCUMENT_BYTES + 1 == 2**31 - 1
