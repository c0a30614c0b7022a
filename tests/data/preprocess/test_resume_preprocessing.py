"""A run that is killed or fails leaves nothing that looks finished, and goes on with --resume to the same bytes."""

import dataclasses
import errno
import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter, Mark
from megatron_ltd.data.preprocess import pipeline as module
from megatron_ltd.data.preprocess.encoding import EncodedBlock, EncodingPlan
from megatron_ltd.data.preprocess.pipeline import preprocess
from megatron_ltd.data.text.sentences import SentencePlan
from megatron_ltd.errors import ConfigError, DataError
from tests.checkpoint.faults import count_operations, killed_at, refused_at
from tools import preprocess_data

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"
PLAN = EncodingPlan(DataConfig(tokenizer_type="NullTokenizer"), 1000, ("text", "title"), append_eod=True,
                    on_bad_line="quarantine")


def inputs(folder: Path, lines: int = 12000) -> list[Path]:
    """Three files of several blocks in all, with bad lines here and there."""
    numbers = np.random.default_rng(7)
    rows = [json.dumps({"title": str(i % 1000), "text": " ".join(map(str, numbers.integers(0, 1000, i % 61)))})
            for i in range(lines)]
    for i in range(50, lines, 701):
        rows[i] = f"oops {i}"
    data = [("\n".join(part) + "\n").encode() for part in (rows[:lines // 2], rows[lines // 2:-9], rows[-9:])]
    paths = [folder / "a.jsonl", folder / "b.jsonl.gz", folder / "c.jsonl"]
    for path, content in zip(paths, data, strict=True):
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return paths


def run(plan: EncodingPlan, paths: list[Path], prefix: Path, workers: int = 1, resume: bool = False) -> None:
    preprocess(plan, [str(path) for path in paths], str(prefix), workers, lambda progress: None, resume=resume,
               checkpoint_seconds=0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(Exception):
    """What ends a run from within."""


def stopping_after(blocks: int, error: Exception) -> Callable[..., Any]:
    """`_Run._add` that ends the run after so many blocks."""
    original, seen = module._Run._add, 0

    def add(self: Any, block: EncodedBlock) -> None:
        nonlocal seen
        seen += 1
        if seen > blocks:
            raise error
        original(self, block)
    return add


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sentences", [None, SentencePlan("rules")], ids=["documents", "sentences"])
def test_a_run_that_failed_goes_on_to_the_same_bytes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, sentences: SentencePlan | None) -> None:
    paths, plan = inputs(tmp_path), dataclasses.replace(PLAN, sentences=sentences)
    run(plan, paths, tmp_path / "whole" / "c")
    expected = files(tmp_path / "whole")
    assert len(expected) == 8, "three files for each key, and the rejected lines"
    for blocks in (1, 2, 4):
        folder = tmp_path / f"{blocks}"
        with monkeypatch.context() as patch:
            patch.setattr(module._Run, "_add", stopping_after(blocks, Stop()))
            with pytest.raises(Stop):
                run(plan, paths, folder / "c", workers)
        finished = (".bin", ".idx", ".manifest.json", "_rejected.txt", "_rejected.jsonl")
        assert not [name for name in files(folder) if name.endswith(finished)]
        if blocks == 2:
            with open(next(folder.glob("*.bin.partial")), "ab") as stream:
                stream.write(b"what was written after the mark")
        run(plan, paths, folder / "c", workers, resume=True)
        assert files(folder) == expected


def test_blocks_that_are_done_are_not_tokenized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = inputs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_add", stopping_after(3, Stop()))
        with pytest.raises(Stop):
            run(PLAN, paths, tmp_path / "c")
    done = json.loads((tmp_path / "c.resume.json").read_text())["documents"]
    seen = []
    original = module._Run._add
    monkeypatch.setattr(module._Run, "_add", lambda self, block: (
        seen.append(len(block.documents[0].sequences)), original(self, block))[1])
    run(PLAN, paths, tmp_path / "c", resume=True)
    assert done > 0 and done + sum(seen) == len(IndexedCorpus(str(tmp_path / "c_text_document")).document_indices) - 1


def test_a_run_that_is_killed_at_any_file_operation_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    paths = inputs(tmp_path, lines=600)
    run(PLAN, paths, tmp_path / "whole" / "c")
    expected = files(tmp_path / "whole")
    operations = count_operations(lambda: run(PLAN, paths, tmp_path / "count" / "c"))
    assert operations > 20
    for n in range(1, operations + 1):
        folder = tmp_path / str(n)
        assert killed_at(n, lambda: run(PLAN, paths, folder / "c"))  # noqa: B023
        for index in folder.glob("*.idx") if folder.exists() else ():
            IndexedCorpus(str(index.with_suffix("")))  # one that has its name is whole
        run(PLAN, paths, folder / "c", resume=True)
        assert files(folder) == expected, f"killed at operation {n}"


def test_a_full_disk_is_explained_and_leaves_no_file_under_a_final_name(tmp_path: Path) -> None:
    paths = inputs(tmp_path, lines=600)
    run(PLAN, paths, tmp_path / "whole" / "c")
    expected, told = files(tmp_path / "whole"), 0
    operations = count_operations(lambda: run(PLAN, paths, tmp_path / "count" / "c"))
    for n in range(1, operations + 1):
        folder = tmp_path / str(n)
        try:
            with refused_at(n, errno.ENOSPC):
                run(PLAN, paths, folder / "c")
        except DataError as error:
            assert "No space left on device" in str(error) and str(folder) in str(error)
            told += 1
        finished = [path for path in folder.glob("*.idx")]
        for index in finished:
            IndexedCorpus(str(index.with_suffix("")))
        run(PLAN, paths, folder / "c", resume=True)
        assert files(folder) == expected, f"refused at operation {n}"
    assert told > 20


def test_a_disk_that_is_full_while_tokens_are_written_is_explained(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        """The stream of a device without room."""

        def __init__(self, stream: Any):
            self._stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = IndexedCorpusWriter.__init__

    def init(self: IndexedCorpusWriter, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **settings)
        self._bin = Full(self._bin)  # type: ignore[assignment]

    monkeypatch.setattr(IndexedCorpusWriter, "__init__", init)
    (tmp_path / "in.jsonl").write_text('{"text": "1 2 3"}\n')
    code = preprocess_data.main(["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out" / "c"),
                                 "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"])
    assert code == 21
    assert "c_text_document cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def arguments(folder: Path, source: Path) -> list[str]:
    return [str(TOOL), "--input", str(source), "--output-prefix", str(folder / "c"), "--tokenizer-type",
            "NullTokenizer", "--vocab-size", "1000", "--append-eod", "--checkpoint-seconds", "0"]


def test_a_run_that_is_killed_at_random_moments_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source, moments = inputs(tmp_path)[0], random.Random(3)
    lines = [line for line in source.read_bytes().splitlines(keepends=True) if line.startswith(b"{")]
    source.write_bytes(b"".join(lines * 4))
    command = [sys.executable, *arguments(tmp_path / "whole", source)]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - started
    expected, killed = files(tmp_path / "whole"), 0
    for attempt in range(12):
        if attempt >= 3 and killed:
            break
        folder, workers = tmp_path / str(attempt), ["--workers", str(1 + attempt % 2)]
        again = [sys.executable, *arguments(folder, source), *workers]
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # Ever earlier, if none was killed because the first run met a busier machine than the others.
            process.wait(timeout=moments.uniform(0.2, 1.0) * seconds / (1 + attempt // 3))
        except subprocess.TimeoutExpired:
            process.kill()
        killed += process.wait() != 0
        done = subprocess.run([*again, "--resume"], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert files(folder) == expected
    assert killed


def test_other_settings_or_files_are_not_taken_for_the_same_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = inputs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_add", stopping_after(2, Stop()))
        with pytest.raises(Stop):
            run(PLAN, paths, tmp_path / "out" / "c")
    for changed, words in ((dataclasses.replace(PLAN, append_eod=False), "--append-eod = True, and now it is False"),
                           (dataclasses.replace(PLAN, vocab_size=999), "the tokenizer's digest"),
                           (dataclasses.replace(PLAN, on_bad_line="skip"), "--on-bad-line")):
        with pytest.raises(ConfigError, match=f"--resume: .*{words}"):
            run(changed, paths, tmp_path / "out" / "c", resume=True)
    with pytest.raises(ConfigError, match="--resume: .*--input"):
        run(PLAN, paths[:2], tmp_path / "out" / "c", resume=True)
    os.utime(paths[2], ns=(1, 1))
    with pytest.raises(ConfigError, match="--resume: .*sizes and times of the input"):
        run(PLAN, paths, tmp_path / "out" / "c", resume=True)
    run(PLAN, paths, tmp_path / "out" / "c")
    assert len(files(tmp_path / "out")) == 8, "without --resume it starts again, and leaves nothing of the old run"


@pytest.mark.parametrize("name", ["c.resume.json", "c_text_document.bin.partial", "c_text_document.lengths.partial",
                                  "c_title_document.documents.partial", "c_rejected.jsonl.partial"])
def test_damaged_partial_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    paths = inputs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_add", stopping_after(3, Stop()))
        with pytest.raises(Stop):
            run(PLAN, paths, tmp_path / "out" / "c")
    path = tmp_path / "out" / name
    data = path.read_bytes()
    for damaged in (data[:-40], bytes(len(data)) if "rejected" not in name else b"", None):
        if damaged is None:
            if name == "c.resume.json":
                continue
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(DataError, match="without --resume"):
            run(PLAN, paths, tmp_path / "out" / "c", resume=True)
        path.write_bytes(data)


def test_the_tool_says_that_work_is_kept_and_resume_without_any_starts_anew(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = inputs(tmp_path)[2]
    command = arguments(tmp_path / "out", source)[1:]
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_progress", lambda self: (_ for _ in ()).throw(DataError("stop")))
        assert preprocess_data.main(command[:-2]) == 21
    assert "--resume" not in capsys.readouterr().err, "nothing was kept of so short a run"
    assert preprocess_data.main([*command, "--resume"]) == 0
    with source.open("a") as stream:
        stream.write("oops\n")
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_describe", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert preprocess_data.main([*command, "--on-bad-line", "skip"]) == 130
    assert "the same command with --resume continues" in capsys.readouterr().err


def test_marks_of_a_writer_go_on_where_they_were(tmp_path: Path) -> None:
    numbers, marks = np.random.default_rng(1), list[Mark]()
    documents = [numbers.integers(0, 90, size).tolist() for size in numbers.integers(0, 50, 60)]
    with IndexedCorpusWriter(str(tmp_path / "whole"), 90) as writer:
        for document in documents:
            writer.add_document(document)
    written, mark = 0, None
    while written < len(documents):
        writer = IndexedCorpusWriter(str(tmp_path / "c"), 90, resume=mark)
        for document in documents[written:written + 7]:
            writer.add_document(document)
        written = min(written + 7, len(documents))
        mark = writer.mark()
        marks.append(mark)
        writer.add_document([1, 2, 3])  # lost
        writer.keep = True
        writer.abort()
    with IndexedCorpusWriter(str(tmp_path / "c"), 90, resume=mark):
        pass
    assert [m.documents for m in marks] == [*range(7, 60, 7), 60]
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"c.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4
