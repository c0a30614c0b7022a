"""A damaged or misplaced task file is named, with what to do."""

import gzip
import hashlib
import re
import zipfile
from pathlib import Path

import pytest
import zstandard

from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.lm_eval.listed import plan_listed
from megatron_ltd.lm_eval.tasks.names import plan_tasks
from megatron_ltd.lm_eval.tasks.task_files import (
    find_task_file,
    plain_suffix,
    read_json_lines,
    read_records,
    read_text,
    sha256_of,
)


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', "3", '{"text": 5}', '{"txt": "a b"}', "not json", "[" * 100_000, "9" * 5000,
             r'{"text": "a \ud800 b"}']
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"text": "a b"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:3") + "[ :]"):
        [record.text("text") for record in read_json_lines(path)]


def test_a_malformed_line_after_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"text": "a b"}\nnonsense\n')
    assert [record.text("text") for record in read_json_lines(path, limit=1)] == ["a b"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_is_reported_as_damaged(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"task.jsonl{suffix}"
    path.write_bytes(pack("".join(f'{{"text": "a {n}"}}\n' for n in range(1000)).encode())[:-20])
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*before its end"):
        read_json_lines(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_packed_as_its_name_says_is_reported(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"task.jsonl{suffix}"
    path.write_text('{"text": "a b"}\n')
    with pytest.raises(DataError, match=re.escape(f"{path}, near byte")):
        read_json_lines(path)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"a": "1"}'), ("a.json", '[{"a": "1"}]'),
                                            ("a.json", '{"a": "1"}'), ("a.tsv", "a\r\n1")])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(f"\ufeff{text}\r\n".encode())
    assert [record.values for record in read_records(tmp_path / name)] == [{"a": "1"}]


def test_what_a_mac_adds_to_an_archive_is_no_task_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "blimp.zip", "w") as archive:
        archive.writestr("blimp/wh_island.jsonl", '{"a": 1}\n')
        archive.writestr("__MACOSX/blimp/._wh_island.jsonl", b"\0\5\x16\7")
    assert [record.values for record in read_records(tmp_path / "blimp.zip")] == [{"a": 1}]


def test_a_file_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        read_json_lines(tmp_path / "none.jsonl")


def test_text_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_lines_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="has no examples"):
        read_json_lines(path)


@pytest.mark.parametrize("place", ["sub/task.jsonl", "sub/task.jsonl.gz", "task.jsonl", "task.jsonl.zst"])
def test_a_task_file_is_found_in_its_folder_or_directly_packed_or_not(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert find_task_file("task", tmp_path, ("other/name.raw", "sub/task.jsonl")) == path


def test_a_missing_task_file_is_reported_with_the_names_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lambada/lambada_test\.jsonl.*name a file: lambada=PATH"):
        find_task_file("lambada", tmp_path, ("lambada/lambada_test.jsonl",))
    with pytest.raises(DataError, match="is not a folder"):
        find_task_file("lambada", tmp_path / "none", ("lambada/lambada_test.jsonl",))


def test_suffixes_are_those_under_the_packing() -> None:
    names = ("a.jsonl", "a.b.jsonl.gz", "a.txt.zst", "a")
    assert [plain_suffix(Path(name)) for name in names] == [".jsonl", ".jsonl", ".txt", ""]


def test_the_digest_is_sha256_of_the_stored_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(b"anything")
    assert sha256_of(path) == hashlib.sha256(b"anything").hexdigest()


def test_a_plan_finds_all_files_and_names_repeated_tasks_by_file(tmp_path: Path) -> None:
    for name in ("lambada_test.jsonl.gz", "a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    listed = f"lambada, perplexity={tmp_path}/a.jsonl,perplexity={tmp_path}/b.jsonl"
    plan = plan_listed(listed, tmp_path, None, flag="--tasks")
    assert [(run.name, run.path.name) for run in plan] == [
        ("lambada", "lambada_test.jsonl.gz"), ("perplexity:a.jsonl", "a.jsonl"), ("perplexity:b.jsonl", "b.jsonl")
    ]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("", "names no task"),
        ("lambda", "--tasks = 'lambda': there is no task 'lambda'"),
        ("lambada={0},lambada={0}", "more than once"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path: Path, listed: str, message: str) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_listed(listed.format(tmp_path / "a.jsonl"), None, None, flag="--tasks")


@pytest.mark.parametrize(("listed", "kind", "message"), [
    ("lambada", ConfigError, "needs --task-data"),
    ("perplexity", ConfigError, "Name one: perplexity=PATH"),
    ("lambada=none.jsonl", DataError, "there is no file 'none.jsonl'"),
])
def test_a_task_without_its_file_is_planned_with_that_problem(
    tmp_path: Path, listed: str, kind: type[Exception], message: str,
) -> None:
    (tmp_path / "a.jsonl").touch()
    missing, there = plan_tasks([listed, f"wikitext={tmp_path}/a.jsonl"], None)
    assert isinstance(missing.problem, kind) and message in str(missing.problem)
    assert there.problem is None


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfone\r\ntwo\r\n", b"\xef\xbb\xbfone\ntwo\n", b"one\r\ntwo\r\n"])
def test_a_text_is_the_same_whatever_its_line_ends_and_what_was_changed_is_told(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    text, notes = read_text(path)
    assert text == "one\ntwo\n"
    assert notes == (*(["line ends of 2 lines read as Unix line ends"] if b"\r" in data else []),
                     *(["1 byte order mark at the beginning left out"] if data[0] == 0xEF else []))
