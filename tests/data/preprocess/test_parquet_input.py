from pathlib import Path
from typing import Any

import pytest

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.manifest import read_manifest
from megatron_ltd.data.preprocess import pipeline as module
from megatron_ltd.data.preprocess.encoding import EncodingPlan
from megatron_ltd.data.preprocess.pipeline import preprocess
from megatron_ltd.data.preprocess.table_input import open_input
from megatron_ltd.data.preprocess.text_input import expand_inputs
from megatron_ltd.errors import DataError

PLAN = EncodingPlan(DataConfig(tokenizer_type="NullTokenizer"), 1000, ("text", "title"), append_eod=True)


def texts(rows: int) -> dict[str, list[Any]]:
    return {"id": list(range(rows)), "text": [" ".join(str((7 * i + j) % 1000) for j in range(i % 90))
                                              for i in range(rows)], "title": [str(i % 1000) for i in range(rows)]}


def write(path: Path, columns: dict[str, list[Any]], **settings: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def jsonl(path: Path, columns: dict[str, list[Any]]) -> Path:
    import json
    rows = zip(columns["text"], columns["title"], strict=True)
    path.write_text("".join(json.dumps({"text": text, "title": title}) + "\n" for text, title in rows))
    return path


def run(paths: list[Path], prefix: Path, workers: int = 1, resume: bool = False, plan: EncodingPlan = PLAN) -> None:
    preprocess(plan, [str(path) for path in paths], str(prefix), workers, lambda progress: None, resume=resume,
               checkpoint_seconds=0)


def corpora(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_table_gives_the_corpora_of_the_same_lines(tmp_path: Path, workers: int) -> None:
    columns = texts(12000)
    source = write(tmp_path / "in.parquet", columns, row_group_size=5000)
    run([jsonl(tmp_path / "in.jsonl", columns)], tmp_path / "lines" / "c")
    run([source], tmp_path / "table" / "c", workers)
    assert corpora(tmp_path / "table") == corpora(tmp_path / "lines")
    manifest = read_manifest(str(tmp_path / "table" / "c_text_document"))
    assert manifest is not None and manifest.sources[0].bytes == source.stat().st_size
    assert len(list(open_input(str(source), ("text",)).blocks())) > 2, "several blocks"


def test_a_run_over_tables_that_failed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / "a.parquet", texts(9000)), write(tmp_path / "b.parquet", texts(50))]
    run(paths, tmp_path / "whole" / "c")
    original, seen = module._Run._add, 0

    def add(self: Any, block: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt
        original(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_add", add)
        with pytest.raises(KeyboardInterrupt):
            run(paths, tmp_path / "out" / "c")
    run(paths, tmp_path / "out" / "c", resume=True)
    assert corpora(tmp_path / "out") == corpora(tmp_path / "whole")


def test_rows_that_hold_no_text_are_named_or_left_out(tmp_path: Path) -> None:
    columns = {"text": ["1", None, "3"], "title": ["4", "5", "6"]}
    source = write(tmp_path / "in.parquet", columns)
    with pytest.raises(DataError, match=r"in\.parquet:2:0: NoneType under key 'text'; it must hold a string"):
        run([source], tmp_path / "out" / "c")
    plan = EncodingPlan(PLAN.tokenizer, 1000, PLAN.json_keys, on_bad_line="quarantine")
    run([source], tmp_path / "out" / "c", plan=plan)
    corpus = IndexedCorpus(str(tmp_path / "out" / "c_title_document"))
    assert [corpus.read(i).tolist() for i in range(len(corpus))] == [[4], [6]]
    assert (tmp_path / "out" / "c_rejected.jsonl").read_text() == '{"text": null, "title": "5"}\n'


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_a_row_that_is_not_utf8_is_named_or_left_out(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    offsets, data = pyarrow.array([0, 1, 3, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"1\xc3(3")
    text = pyarrow.StringArray.from_buffers(3, offsets, data)  # Arrow itself does not look at the bytes
    text = text.dictionary_encode() if kind == "dictionary" else text.cast(getattr(pyarrow, kind)())
    source = write(tmp_path / "in.parquet", {"text": text, "title": ["4", "5", "6"]})
    with pytest.raises(DataError, match=r"in\.parquet:2:0: not UTF-8: invalid continuation byte at byte 0 under key "
                                        r"'text'.*--on-bad-line skip"):
        run([source], tmp_path / "out" / "c")
    plan = EncodingPlan(PLAN.tokenizer, 1000, PLAN.json_keys, on_bad_line="skip")
    run([source], tmp_path / "out" / "c", plan=plan)
    for key, expected in (("text", [[1], [3]]), ("title", [[4], [6]])):
        corpus = IndexedCorpus(str(tmp_path / "out" / f"c_{key}_document"))
        assert [corpus.read(i).tolist() for i in range(len(corpus))] == expected


def test_what_is_no_table_or_lacks_a_column_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", {"content": ["1"]})
    with pytest.raises(DataError, match=r"in\.parquet: no column 'text' among 'content' \(--json-keys\)"):
        run([source], tmp_path / "out" / "c")
    data = source.read_bytes()
    for damaged in (b"", b"PAR1", data[:-9], data[:len(data) // 2], b"{}\n" * 40):
        source.write_bytes(damaged)
        with pytest.raises(DataError, match=r"in\.parquet cannot be read as parquet"):
            run([source], tmp_path / "out" / "c")
    assert not list((tmp_path / "out").iterdir())


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="needs the package pyarrow. Install it: pip install pyarrow"):
        run([tmp_path / "in.parquet"], tmp_path / "out" / "c")


def test_a_folder_stands_for_the_files_of_text_in_it(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", "d.parquet", "e.md", ".hidden.jsonl", "sub/deep/f.json.zst"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("")
    found = expand_inputs([str(tmp_path / "in"), str(tmp_path / "in" / "b.jsonl")])
    assert [path.removeprefix(f"{tmp_path}/in/") for path in found] == [
        "a.jsonl.gz", "b.jsonl", "d.parquet", "sub/c.txt", "sub/deep/f.json.zst", "b.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"--input = .*empty: no file in this folder ends in \.jsonl"):
        expand_inputs([str(tmp_path / "empty")])
