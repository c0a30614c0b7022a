"""What is recorded beside a corpus, and what is refused on its account."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.build import build_datasets
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.manifest import check_manifest, manifest_path, read_manifest, verify_manifest
from megatron_ltd.data.text.tokenizer import NullTokenizer
from megatron_ltd.errors import DataError
from tests.data.corpora import described, random_documents, write_corpus
from tools import inspect_dataset, preprocess_data

SAMPLES = (30, 0, 0)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def preprocessed(folder: Path, *extra: str) -> Path:
    """A corpus of numbers below 500, as the tool writes it."""
    documents = random_documents(5, 60, 40, 500)
    (folder / "in.jsonl").write_text("".join(
        json.dumps({"text": " ".join(map(str, document))}) + "\n" for document in documents))
    assert preprocess_data.main(["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "c"),
                                 "--tokenizer-type", "NullTokenizer", "--vocab-size", "500", "--append-eod",
                                 *extra]) == 0
    return folder / "c_text_document"


def run_with(prefix: Path) -> RunConfig:
    return RunConfig(model=ModelConfig(seq_length=8), data=DataConfig(data_path=(str(prefix),), split="100,0,0"))


def test_the_tool_records_both_files_the_tokenizer_and_the_sources(tmp_path: Path) -> None:
    prefix = preprocessed(tmp_path)
    found = json.loads(Path(manifest_path(str(prefix))).read_text())
    for suffix in ("bin", "idx"):
        path = prefix.with_suffix(f".{suffix}")
        assert found[suffix] == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    corpus = IndexedCorpus(str(prefix))
    assert (found["documents"], found["sequences"], found["tokens"]) == (
        len(corpus.document_indices) - 1, len(corpus), corpus.tokens)
    source = tmp_path / "in.jsonl"
    assert found["sources"] == [{"bytes": source.stat().st_size, "sha256": sha256(source), "path": str(source)}]
    assert found["tokenizer"] == NullTokenizer(500).digest and found["vocab_size"] == 501
    assert found["settings"]["append_eod"] is True and found["settings"]["tokenizer_type"] == "NullTokenizer"


def test_training_takes_the_tokenizer_of_the_corpus_and_refuses_another(tmp_path: Path) -> None:
    config = run_with(preprocessed(tmp_path))
    assert len(build_datasets(config, NullTokenizer(500), *SAMPLES).train) >= 30
    with pytest.raises(DataError, match=r"c_text_document was written with another tokenizer \(NullTokenizer"):
        build_datasets(config, NullTokenizer(600), *SAMPLES)


def test_a_corpus_without_a_manifest_loads_with_any_tokenizer_that_has_its_ids(tmp_path: Path) -> None:
    prefix = preprocessed(tmp_path)
    Path(manifest_path(str(prefix))).unlink()
    for size in (500, 600):
        assert len(build_datasets(run_with(prefix), NullTokenizer(size), *SAMPLES).train) >= 30
    corpus = IndexedCorpus(str(prefix))
    assert check_manifest(corpus, "any") is None and verify_manifest(corpus, "any") is None


def test_training_refuses_a_corpus_that_another_has_replaced(tmp_path: Path) -> None:
    prefix = preprocessed(tmp_path)
    manifest = Path(manifest_path(str(prefix))).read_bytes()
    other = write_corpus(tmp_path / "other", random_documents(6, 60, 40, 500), 500)
    for suffix in ("bin", "idx"):
        prefix.with_suffix(f".{suffix}").write_bytes((Path(other.prefix).with_suffix(f".{suffix}")).read_bytes())
    with pytest.raises(DataError, match=r"c_text_document\.idx is not the file that was written: SHA-256"):
        build_datasets(run_with(prefix), NullTokenizer(500), *SAMPLES)
    write_corpus(prefix, random_documents(6, 60, 40, 500), 500)
    assert not Path(manifest_path(str(prefix))).exists(), "a writer takes an old manifest away"
    assert manifest


def test_only_verifying_sees_another_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = preprocessed(tmp_path)
    path = prefix.with_suffix(".bin")
    command = ["--data-path", str(prefix), "--tokenizer-type", "NullTokenizer", "--vocab-size", "500"]
    assert inspect_dataset.main([*command, "--verify"]) == 0
    said = capsys.readouterr().out
    assert "manifest        agrees with all of both files" in said and "made from       1 files" in said
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert inspect_dataset.main(command) == 0
    assert "manifest        agrees with the index and both sizes" in capsys.readouterr().out
    assert inspect_dataset.main([*command, "--verify"]) == 21
    assert "c_text_document.bin is not the file that was written" in capsys.readouterr().err
    run, samples = run_with(prefix), (NullTokenizer(500), *SAMPLES)
    assert len(build_datasets(run, *samples).train) >= 30
    with pytest.raises(DataError, match=r"c_text_document\.bin is not the file that was written"):
        build_datasets(dataclasses.replace(run, data=dataclasses.replace(run.data, verify_corpus=True)), *samples)
    assert inspect_dataset.main([*command[:-1], "600"]) == 21
    assert "written with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"format": 2}', b'{"format": 1}', b"[" * 100000,
    b'{"format": 1, "bin": 3, "idx": 4}'])
def test_a_manifest_that_is_none_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3]], 100)
    Path(manifest_path(corpus.prefix)).write_bytes(content)
    with pytest.raises(DataError, match=r"c\.manifest\.json is not the manifest of a corpus"):
        check_manifest(corpus, None)


@pytest.mark.parametrize("changes", [
    {"bin": None}, {"idx": {"bytes": 3}}, {"sources": [3]}, {"sources": None}, {"more": 1}, {"settings": 7},
    {"idx": {"bytes": 3, "sha256": 5}}])
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3]], 100)
    described(corpus, "digest", 100)
    path = Path(manifest_path(corpus.prefix))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError, match="is not the manifest of a corpus"):
        check_manifest(corpus, "other")


def test_a_manifest_that_is_read_is_the_one_that_was_written(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3]], 100)
    manifest = described(corpus, None, 100)
    assert read_manifest(corpus.prefix) == manifest
    assert check_manifest(corpus, "any digest") == manifest, "a tokenizer that is not known is not compared"
    assert dataclasses.replace(manifest, tokenizer="x").to_bytes() != manifest.to_bytes()
