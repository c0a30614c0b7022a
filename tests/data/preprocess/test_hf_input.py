"""Datasets of Hugging Face's library become the corpora of the same lines; they are made here, without a network."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.data.corpus.manifest import read_manifest
from megatron_ltd.data.preprocess import pipeline as module
from megatron_ltd.data.preprocess.pipeline import preprocess
from megatron_ltd.data.preprocess.table_input import HfInput, HfSource
from megatron_ltd.errors import ConfigError, DataError
from tests.data.preprocess.test_parquet_input import PLAN, corpora, jsonl, texts
from tests.data.preprocess.test_resume_preprocessing import Stop, files, stopping_after
from tools import preprocess_data

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def saved(path: Path, columns: dict[str, list[Any]]) -> HfSource:
    datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    return HfSource(str(path))


def run(source: HfSource | Path, prefix: Path, workers: int = 1, resume: bool = False, **plan: Any) -> None:
    inputs: list[str | HfSource] = [source if isinstance(source, HfSource) else str(source)]
    preprocess(dataclasses.replace(PLAN, **plan), inputs, str(prefix), workers, lambda progress: None, resume=resume,
               checkpoint_seconds=0)


@pytest.fixture
def lines(tmp_path: Path) -> dict[str, bytes]:
    """The corpora of 9,000 lines."""
    run(jsonl(tmp_path / "in.jsonl", texts(9000)), tmp_path / "lines" / "c")
    return corpora(tmp_path / "lines")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset_gives_the_corpora_of_the_same_lines(tmp_path: Path, lines: dict[str, bytes], workers: int,
                                                             streaming: bool) -> None:
    source = dataclasses.replace(saved(tmp_path / "saved", texts(9000)), streaming=streaming)
    run(source, tmp_path / "out" / "c", workers)
    assert corpora(tmp_path / "out") == lines
    manifest = read_manifest(str(tmp_path / "out" / "c_text_document"))
    assert manifest is not None and manifest.sources[0].path == f"{tmp_path}/saved[train]"
    whole = HfInput(source, PLAN.json_keys)
    blocks = list(whole.blocks())
    assert len(blocks) > 2 and manifest.sources[0].sha256 == whole.sha256


@pytest.mark.parametrize("kind", ["folder", "in.jsonl", "in.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_the_library_reads_give_the_same(tmp_path: Path, lines: dict[str, bytes], kind: str,
                                                    streaming: bool) -> None:
    path = tmp_path / "data" / ("in.parquet" if kind == "folder" else kind)
    path.parent.mkdir()
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict(texts(9000)).to_parquet(str(path))
    else:
        jsonl(path, texts(9000))
    run(HfSource(str(path.parent if kind == "folder" else path), streaming=streaming), tmp_path / "out" / "c")
    assert corpora(tmp_path / "out") == lines


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_that_failed_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int,
                                                     streaming: bool) -> None:
    source = dataclasses.replace(saved(tmp_path / "saved", texts(9000)), streaming=streaming)
    run(source, tmp_path / "whole" / "c")
    for blocks in (1, 2) if workers == 1 else (2,):
        folder = tmp_path / f"{blocks}"
        with monkeypatch.context() as patch:
            patch.setattr(module._Run, "_add", stopping_after(blocks, Stop()))
            with pytest.raises(Stop):
                run(source, folder / "c", workers)
        run(source, folder / "c", workers, resume=True)
        assert files(folder) == files(tmp_path / "whole")


@pytest.mark.parametrize("change", ["a row", "fewer rows"])
def test_a_run_does_not_go_on_with_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    source = saved(tmp_path / "saved", texts(9000))
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_add", stopping_after(2, Stop()))
        with pytest.raises(Stop):
            run(source, tmp_path / "c")
    columns = texts(9000) if change == "a row" else texts(100)
    if change == "a row":
        columns["text"][5] = "1 2 3"
    (tmp_path / "saved").rename(tmp_path / "old")
    saved(tmp_path / "saved", columns)
    with pytest.raises(DataError, match="other rows before row|fewer than the interrupted run had read"):
        run(source, tmp_path / "c", resume=True)


def test_rows_that_hold_no_text_are_named_or_left_out(tmp_path: Path) -> None:
    columns = texts(10)
    columns["text"][3] = None
    source = saved(tmp_path / "saved", columns)
    with pytest.raises(DataError, match=r"saved\[train\]:4:0: NoneType under key 'text'"):
        run(source, tmp_path / "out" / "c")
    assert not list((tmp_path / "out").iterdir())
    run(source, tmp_path / "out" / "c", on_bad_line="quarantine")
    kept = [json.loads(line) for line in (tmp_path / "out" / "c_rejected.jsonl").read_text().splitlines()]
    assert kept == [{"text": None, "title": "3"}]
    for key in ("text", "title"):
        del columns[key][3]
    run(jsonl(tmp_path / "in.jsonl", columns), tmp_path / "lines" / "c")
    assert corpora(tmp_path / "out") == corpora(tmp_path / "lines")


@pytest.mark.parametrize(("settings", "words"), [
    ({"name": "nowhere"}, r"--hf-dataset = nowhere\[train\] cannot be loaded"),
    ({"split": "other"}, r"--hf-split = other: .* holds train, test"),
    ({"config": "a"}, "--hf-config = a: .* has none"),
    ({"split": "test"}, "no column 'text' among 'title'")])
def test_what_is_not_there_is_refused(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict(texts(3)),
                                 "test": datasets.Dataset.from_dict({"title": ["a"]})})
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises((ConfigError, DataError), match=words):
        HfInput(HfSource(**{"name": str(tmp_path / "saved"), **settings}), PLAN.json_keys)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "saved", texts(3))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets. Install it: pip install -e '\.\[datasets\]'"):
        HfInput(source, PLAN.json_keys)


def test_the_command_reads_a_dataset(tmp_path: Path, lines: dict[str, bytes],
                                     capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "saved", texts(9000))
    command = ["--hf-dataset", source.name, "--json-keys", "text", "title", "--append-eod", "--output-prefix",
               str(tmp_path / "out" / "c"), "--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]
    assert preprocess_data.main(command) == 0
    assert corpora(tmp_path / "out") == lines
    assert preprocess_data.main([*command, "--input", "x"]) == ConfigError.exit_code
    assert "Give either --input or --hf-dataset" in capsys.readouterr().err
    assert preprocess_data.main(["--input", str(tmp_path), *command[2:], "--hf-split", "test"]) == ConfigError.exit_code
    assert "--hf-split has no effect without --hf-dataset" in capsys.readouterr().err
