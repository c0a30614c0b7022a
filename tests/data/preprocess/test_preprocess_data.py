import dataclasses
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import zstandard

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.preprocess import documents, in_order
from megatron_ltd.data.preprocess.encoding import EncodingPlan
from megatron_ltd.data.preprocess.pipeline import Progress, preprocess
from megatron_ltd.data.text.sentences import RuleSplitter, SentencePlan
from megatron_ltd.errors import DataError
from tests.train.launchers import runs
from tools import preprocess_data

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"
NUMBERS = EncodingPlan(DataConfig(tokenizer_type="NullTokenizer"), 1000, append_eod=True)


def run_tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The tool as a user runs it, in a folder where nothing points to the package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, check=False)


def number_lines(seed: int, count: int) -> list[str]:
    """Loose JSON with texts of numbers for a NullTokenizer of 1,000 ids; some are empty."""
    random = np.random.default_rng(seed)
    return [json.dumps({"id": i, "text": " ".join(map(str, random.integers(0, 1000, random.integers(0, 60))))})
            for i in range(count)]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def corpus_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def preprocess_quietly(plan: EncodingPlan, inputs: list[Path], prefix: Path, workers: int = 1) -> IndexedCorpus:
    preprocess(plan, [str(path) for path in inputs], str(prefix), workers, lambda progress: None)
    return IndexedCorpus(f"{prefix}_{plan.json_keys[0]}_document")


def test_the_tool_writes_the_corpus_that_megatron_core_would(tmp_path: Path, shared_data: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "tokenizers" / "gpt2"
    source = shared_data / "train" / "wiki.valid.jsonl.zst"
    with zstandard.open(source, "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    run = run_tool("--input", source, "--output-prefix", tmp_path / "wiki", "--append-eod", "--workers", 2,
                   "--log-interval", 200, "--tokenizer-type", "GPT2BPETokenizer",
                   "--vocab-file", folder / "vocab.json", "--merge-file", folder / "merges.txt", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Wrote " in run.stdout and f"{len(texts)} documents" in run.stdout
    assert "Processed " in run.stderr and "MB/s" in run.stderr and "100% of the input" in run.stderr
    reference = transformers.GPT2TokenizerFast.from_pretrained(str(folder))
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), np.uint16)
    for ids in reference(texts).input_ids:
        builder.add_document([*ids, 50256], [len(ids) + 1])
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"wiki_text_document.{suffix}").read_bytes() == (tmp_path / f"m.{suffix}").read_bytes()


def test_documents_without_tokens_stay_as_documents_without_sequences(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", ['{"text": "5 6"}', '{"text": ""}', '{"text": "  "}', '{"text": "7"}'])
    corpus = preprocess_quietly(NUMBERS, [path], tmp_path / "out")
    assert [corpus.read(i).tolist() for i in range(len(corpus))] == [[5, 6, 1000], [7, 1000]]
    assert corpus.document_indices.tolist() == [0, 1, 1, 1, 2]


def test_without_append_eod_documents_are_left_as_they_are(tmp_path: Path) -> None:
    plan = EncodingPlan(DataConfig(tokenizer_type="NullTokenizer"), 1000)
    corpus = preprocess_quietly(plan, [write(tmp_path / "in.jsonl", ['{"text": "5 6"}'])], tmp_path / "out")
    assert corpus.read(0).tolist() == [5, 6]


def test_every_key_makes_a_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", ['{"title": "1", "text": "2 3"}', '{"title": "4 5", "text": ""}'])
    plan = EncodingPlan(DataConfig(tokenizer_type="NullTokenizer"), 1000, ("title", "text"))
    titles = preprocess_quietly(plan, [path], tmp_path / "out")
    texts = IndexedCorpus(str(tmp_path / "out_text_document"))
    assert [titles.read(i).tolist() for i in range(2)] == [[1], [4, 5]]
    assert texts.read(0).tolist() == [2, 3]
    assert len(titles.document_indices) == len(texts.document_indices) == 3


def test_bytes_do_not_depend_on_workers_files_or_compression(tmp_path: Path) -> None:
    lines = number_lines(1, 9000)
    data = "".join(f"{line}\n" for line in lines).encode()
    assert len(data) > 1 << 20, "several blocks"
    (tmp_path / "all.jsonl").write_bytes(data)
    write(tmp_path / "part-0.jsonl", lines[:100])
    write(tmp_path / "part-1.jsonl", lines[100:5000])
    (tmp_path / "part-2.jsonl").write_bytes("\r\n".join(lines[5000:]).encode())  # and no newline at the end
    members = gzip.compress(data[:100000]) + gzip.compress(data[100000:]) + bytes(512)
    (tmp_path / "all.jsonl.gz").write_bytes(members)
    frames = zstandard.compress(data[:70001]) + zstandard.compress(data[70001:])
    (tmp_path / "all.jsonl.zst").write_bytes(frames)
    parts = [tmp_path / f"part-{i}.jsonl" for i in range(3)]
    found = []
    for number, (inputs, workers) in enumerate([
            ([tmp_path / "all.jsonl"], 1), ([tmp_path / "all.jsonl"], 2), ([tmp_path / "all.jsonl"], 3), (parts, 2),
            ([tmp_path / "all.jsonl.gz"], 1), ([tmp_path / "all.jsonl.zst"], 1)]):
        preprocess_quietly(NUMBERS, inputs, tmp_path / str(number) / "c", workers)
        found.append(corpus_hashes(tmp_path / str(number)))
    assert set(found[0]) == {"c_text_document.bin", "c_text_document.idx", "c_text_document.manifest.json"}
    assert found[:3] == [found[0]] * 3
    for hashes in found:
        del hashes["c_text_document.manifest.json"]  # it names the input
    assert found == [found[0]] * len(found)


SENTENCES = EncodingPlan(DataConfig(tokenizer_type="NullTokenizer"), 1000, append_eod=True,
                         sentences=SentencePlan("rules"))


def test_every_sentence_is_a_sequence_and_documents_are_marked(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", ['{"text": "1 2\\n\\n3\\n\\n4 5"}', '{"text": ""}', '{"text": "6"}'])
    preprocess(SENTENCES, [str(path)], str(tmp_path / "out"), 1, lambda progress: None)
    corpus = IndexedCorpus(str(tmp_path / "out_text_sentence"))
    assert [corpus.read(i).tolist() for i in range(len(corpus))] == [[1, 2], [3], [4, 5, 1000], [6, 1000]]
    assert corpus.document_indices.tolist() == [0, 3, 3, 4]
    assert corpus.read_sequences(1, 4).tolist() == [3, 4, 5, 1000, 6, 1000]


def test_sentence_corpora_equal_megatron_cores_builder_with_any_number_of_workers(
        tmp_path: Path, shared_data: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    source = shared_data / "train" / "wiki.valid.jsonl.zst"
    vocabulary = shared_data / "tokenizers" / "bert" / "bert-large-uncased-vocab.txt"
    tokenizer = DataConfig(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(vocabulary))
    plan = EncodingPlan(tokenizer, None, sentences=SentencePlan("rules"))
    for workers in (1, 3):
        preprocess(plan, [str(source)], str(tmp_path / str(workers) / "c"), workers, lambda progress: None)
    engine, splitter = plan.choose_tokenizer()[0], RuleSplitter()
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), np.uint16)
    with zstandard.open(source, "rt", encoding="utf-8") as stream:
        for line in stream:
            text = json.loads(line)["text"]
            ids = [engine.encode(text[start:end]) for start, end in splitter.spans(text)]
            builder.add_document([token for sentence in ids for token in sentence],
                                 [len(sentence) for sentence in ids if sentence])
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        found = [(tmp_path / str(workers) / f"c_text_sentence.{suffix}").read_bytes() for workers in (1, 3)]
        assert found[0] == found[1] == (tmp_path / f"m.{suffix}").read_bytes()


def test_the_tool_says_what_cuts_sentences(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", ['{"text": "1 2"}'])
    environment = {**os.environ, "NLTK_DATA": str(tmp_path)}
    command = [sys.executable, str(TOOL), "--input", str(path), *map(str, COMMON), "--split-sentences"]
    taken = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert taken.returncode == 0, taken.stderr
    assert "Sentences are split by rules (nltk or its data punkt_tab for klingon is not installed)." in subprocess.run(
        [*command, "--lang", "klingon"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False).stderr
    assert "1 documents, 1 sequences, 2 tokens" in taken.stdout
    refused = subprocess.run([*command, "--lang", "klingon", "--sentence-splitter", "punkt"], cwd=tmp_path,
                             env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 21 and "--sentence-splitter punkt" in refused.stderr


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2\n3\n\n4", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"5\n6\n"))
    corpus = preprocess_quietly(NUMBERS, [tmp_path / "a.txt", tmp_path / "b.txt.gz"], tmp_path / "out")
    assert [corpus.read(i).tolist() for i in range(len(corpus))] == [[1, 2, 3, 4, 1000], [5, 6, 1000]]


def test_progress_counts_documents_text_and_input(tmp_path: Path) -> None:
    seen: list[Progress] = []
    path = write(tmp_path / "in.jsonl", number_lines(2, 9000))
    preprocess(NUMBERS, [str(path)], str(tmp_path / "out"), 1, seen.append, log_interval=1000)
    assert [progress.documents for progress in seen] == sorted({progress.documents for progress in seen} | {9000})[
        :len(seen) - 1] + [9000]
    assert seen[-1].text_bytes == path.stat().st_size
    assert seen[-1].share == 1.0 and 0 < seen[0].share < 1
    assert Progress(300, 6_000_000, 0.25, 2.0).line() == (
        "Processed 300 documents (150.0 docs/s, 3.00 MB/s), 25% of the input, about 6 s left.")
    assert Progress(300, 6_000_000, None, 2.0).line() == "Processed 300 documents (150.0 docs/s, 3.00 MB/s)."


BAD_LINES: list[tuple[str, bytes, str]] = [
    ("blank", b"", "a blank line"),
    ("spaces", b"   ", "a blank line"),
    ("not JSON", b'{"text": "1"', "no JSON object"),
    ("plain text", b"Once upon a time", "no JSON object.*Once upon a time"),
    ("byte order mark", b'\xef\xbb\xbf{"text": "1"}', "no JSON object.*BOM.*at column 1"),
    ("not UTF-8", b'{"text": "\xff1"}', "not UTF-8: invalid start byte at byte 10 of the line"),
    ("list", b"[1]", "a JSON list, not an object"),
    ("number", b"3", "a JSON int, not an object"),
    ("no key", b'{"content": "1"}', "no key 'text'.*--json-keys"),
    ("null", b'{"text": null}', "NoneType under key 'text'"),
    ("list of texts", b'{"text": ["1"]}', "list under key 'text'"),
    ("half a surrogate pair", b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ("nested deeply", b'{"text": ' + b"[" * 100000, "no JSON object"),
    ("long number", b'{"text": ' + b"1" * 5000 + b"}", "no JSON object"),
    ("long line", b'{"text": ' + b"x" * 5000, r"x'\.\.\. Correct"),
]


@pytest.mark.parametrize(("line", "words"), [row[1:] for row in BAD_LINES], ids=[row[0] for row in BAD_LINES])
def test_a_bad_line_is_named_with_file_line_and_byte_and_nothing_is_written(
        tmp_path: Path, line: bytes, words: str) -> None:
    good = b'{"text": "1 2"}\n' * 3
    (tmp_path / "in.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(DataError, match=rf"in\.jsonl:4:{len(good)}: .*{words}"):
        preprocess_quietly(NUMBERS, [tmp_path / "in.jsonl"], tmp_path / "out" / "c")
    assert list((tmp_path / "out").iterdir()) == []


BEFORE = {"c_rejected.jsonl": "c17af6e6c734bfde", "c_text_document.bin": "13c5ffc156985aee",
          "c_text_document.idx": "08a3e8c000f9ae83"}
"""SHA-256 of what version 0.1.0 wrote line by line, with the standard library's parser."""


@pytest.mark.parametrize("parser", ["orjson", "json"])
def test_bytes_are_those_of_earlier_versions(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parser: str) -> None:
    if parser == "json":
        monkeypatch.setattr(documents, "_fast_parser", lambda: None)
    else:
        pytest.importorskip("orjson")
    lines = [line.encode() for line in number_lines(5, 9000)]
    for number, (_, bad, _) in enumerate(BAD_LINES):
        lines.insert(100 + 500 * number, bad)
    lines.insert(7000, b'{"text": "1 2", "n": NaN}')
    lines.insert(7100, b'{"text": "3", "text": "\\u0034 5"} \r')
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    plan = dataclasses.replace(NUMBERS, on_bad_line="quarantine")
    preprocess(plan, [str(tmp_path / "in.jsonl")], str(tmp_path / "out" / "c"), 1, lambda progress: None)
    assert {name: digest[:16] for name, digest in corpus_hashes(tmp_path / "out").items() if name in BEFORE} == BEFORE


ODD_LINES = [line for _, line, _ in BAD_LINES] + [
    b'{"text": "a", "n": %s}' % number for number in (
        b"NaN", b"-Infinity", b"1e999", b"1" * 300, b"1" * 4301, b"-0", b"01", b".5", b"1.", b"0." + b"1" * 5000)] + [
    b'{"text": %s}' % text for text in (
        b'"\\ud83d\\ude00"', b'"\\udc00\\ud83d"', b'"\\u0000\\/"', b'"a\x01"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"',
        b"'a'", b'"a", "text": "b"', b'"a",', b'"a"} {"text": "b"', b'{"text": "a"}', b"true")] + [
    b' \t{"text": "\xc3\xa9"} \r', b'\x0c{"text": "a"}', b'{"text": "a"}\x00', b'"text"', b"null", b'{text: "a"}']


def test_the_fast_parser_takes_and_finds_what_the_standard_one_does() -> None:
    orjson = pytest.importorskip("orjson")
    taken = 0
    for line in ODD_LINES:
        fast = documents._texts_of_plain(line, ["text"], orjson.loads)
        assert fast is None or fast == documents._texts(line, ["text"]), line
        taken += fast is not None
    assert 5 < taken < len(ODD_LINES) // 2


def test_a_short_run_starts_no_worker_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_order, "_HELP_SECONDS", 60.0)
    monkeypatch.setattr(in_order, "worker_processes", lambda *arguments: pytest.fail("started"))
    preprocess_quietly(NUMBERS, [write(tmp_path / "in.jsonl", number_lines(1, 9000))], tmp_path / "c", workers=3)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_bad_lines_can_be_left_out_or_kept_beside_the_corpus(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: Any, workers: int) -> None:
    good = [f'{{"text": "{number}"}}'.encode() for number in range(len(BAD_LINES) + 1)]
    bad = [line for _, line, _ in BAD_LINES]
    lines = [line for pair in zip(good, bad, strict=False) for line in pair] + good[-1:]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    seen: list[Progress] = []
    plan = dataclasses.replace(NUMBERS, on_bad_line=policy)
    preprocess(plan, [str(tmp_path / "in.jsonl")], str(tmp_path / "out" / "c"), workers, seen.append)
    corpus = IndexedCorpus(str(tmp_path / "out" / "c_text_document"))
    assert [corpus.read(i).tolist() for i in range(len(corpus))] == [[number, 1000] for number in range(len(good))]
    assert seen[-1].rejected == len(bad) and f"{len(bad)} bad lines left out" in seen[-1].line()
    message = capsys.readouterr().err
    assert message.count("WARNING: left out") == 10 and "in.jsonl:2:14: a blank line" in message
    rejected = tmp_path / "out" / "c_rejected.jsonl"
    assert rejected.exists() == (policy == "quarantine")
    if policy == "quarantine":
        assert rejected.read_bytes() == b"\n".join(bad) + b"\n"
        reasons = rejected.with_suffix(".txt").read_text().splitlines()
        for number, (reason, (_, _, words)) in enumerate(zip(reasons, BAD_LINES, strict=True)):
            place = sum(len(line) + 1 for line in lines[:2 * number + 1])
            assert re.match(rf".*in\.jsonl:{2 * number + 2}:{place}: ", reason)
            assert re.search(words.removesuffix(" Correct"), reason)
        write(tmp_path / "in.jsonl", ['{"text": "1"}'])
        preprocess(plan, [str(tmp_path / "in.jsonl")], str(tmp_path / "out" / "c"), workers, seen.append)
        assert not rejected.exists(), "a run without bad lines leaves none of an earlier one"
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_run_that_fails_keeps_no_bad_lines(tmp_path: Path) -> None:
    plan = dataclasses.replace(NUMBERS, on_bad_line="quarantine")
    with pytest.raises(DataError, match="No document in"):
        preprocess_quietly(plan, [write(tmp_path / "in.jsonl", ["oops"])], tmp_path / "out" / "c")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_tool_tells_how_many_lines_it_left_out(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ['{"text": "1"}', "oops"])
    run = run_tool("--input", "in.jsonl", *COMMON, "--on-bad-line", "quarantine", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Skipped 1 lines without a valid document; they are in out/c_rejected.jsonl" in run.stdout
    assert "in.jsonl:2:14: no JSON object" in run.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_line_is_the_one_that_is_named(tmp_path: Path, workers: int) -> None:
    lines = number_lines(3, 9000)
    lines[8000], lines[6500] = "later", "earlier"
    place = sum(len(line) + 1 for line in lines[:6500])
    with pytest.raises(DataError, match=rf"in\.jsonl:6501:{place}: .*'earlier'"):
        preprocess_quietly(NUMBERS, [write(tmp_path / "in.jsonl", lines)], tmp_path / "out" / "c", workers)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("name", "damage", "words"), [
    ("in.jsonl.gz", lambda data: data[:-5], "ends at byte .* before its end marker"),
    ("in.jsonl.zst", lambda data: data[:-5], "ends at byte .* before its end marker"),
    ("in.jsonl.gz", lambda data: b"{}" + data, "incorrect header"),
    ("in.jsonl.zst", lambda data: b"{}{}" + data, "near byte .*: "),
    ("in.jsonl.gz", lambda data: data[:len(data) // 2] + b"\xff" * 9 + data[len(data) // 2 + 9:], "near byte .*: "),
    ("in.jsonl.zst", lambda data: data[:200] + bytes(x ^ 255 for x in data[200:250]) + data[250:], "near byte .*: "),
], ids=["gz cut", "zst cut", "no gz", "no zst", "gz overwritten", "zst overwritten"])
def test_a_damaged_compressed_file_is_named(
        tmp_path: Path, name: str, damage: Callable[[bytes], bytes], words: str) -> None:
    data = "".join(f"{line}\n" for line in number_lines(4, 300)).encode()
    zstd = zstandard.ZstdCompressor(write_checksum=True)
    packed = gzip.compress(data) if name.endswith("gz") else zstd.compress(data)
    (tmp_path / name).write_bytes(damage(packed))
    with pytest.raises(DataError, match=rf"{name}.*{words}"):
        preprocess_quietly(NUMBERS, [tmp_path / name], tmp_path / "out" / "c")
    assert list((tmp_path / "out").iterdir()) == []


def test_input_without_a_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No document in .*empty\.jsonl"):
        preprocess_quietly(NUMBERS, [write(tmp_path / "empty.jsonl", [])], tmp_path / "out" / "c")
    assert list((tmp_path / "out").iterdir()) == []


COMMON: list[Any] = ["--output-prefix", "out/c", "--tokenizer-type", "NullTokenizer", "--vocab-size", 1000]


def test_the_tool_runs_from_any_folder_and_takes_globs_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write(tmp_path / f"part-{number}.jsonl", [json.dumps({"text": str(number)})])
    write(tmp_path / "first.jsonl", [json.dumps({"text": "9"})])
    run = run_tool("--input", "first.jsonl", "part-*.jsonl", *COMMON, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    corpus = IndexedCorpus(str(tmp_path / "out" / "c_text_document"))
    assert [corpus.read(i).tolist() for i in range(len(corpus))] == [[9], [0], [1], [2]]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--input", "bad.jsonl", *COMMON], 21, ["DataError", "bad.jsonl:2:14:", "oops"]),
    (["--input", "missing*.jsonl", *COMMON], 21, ["DataError", "--input = missing*.jsonl: no such file"]),
    (["--input", "bad.jsonl", *COMMON, "--keep-newlines"], 20, ["ConfigError", "--keep-newlines has no effect"]),
    (["--input", "bad.jsonl", *COMMON, "--lang", "german"], 20, ["--lang has no effect without --split-sentences"]),
    (["--input", "bad.jsonl", *COMMON, "--partitions=4"], 20, ["--partitions: use --workers"]),
    (["--input", "bad.jsonl", *COMMON, "--colour"], 20, ["--colour: there is no such flag"]),
    (["--input", "bad.jsonl", *COMMON, "--workers", 0], 20, ["--workers = 0 must be at least 1"]),
    (["--input", "bad.jsonl", *COMMON, "--checkpoint-seconds", "-1"], 20, ["--checkpoint-seconds = -1.0 must be at"]),
    (["--input", "bad.jsonl", *COMMON, "--checkpoint-seconds", "nan"], 20, ["--checkpoint-seconds = nan must be at"]),
    (["--input", "bad.jsonl", *COMMON, "--tokenizer-engine", "gigatoken"], 20, ["gigatoken runs byte-level BPE"]),
    (["--input", "bad.jsonl", *COMMON, "--json-keys", "a", "a"], 20, ["a key is given twice"]),
    (["--input", "bad.jsonl", *COMMON[:4]], 20, ["--vocab-size = None"]),
    (["--input", "bad.jsonl", *COMMON, "--tokenizer-type", "TikTokenizer"], 2, ["invalid choice: 'TikTokenizer'"]),
])
def test_the_tool_ends_with_one_message_and_its_exit_code(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[Any],
        code: int, words: list[str]) -> None:
    write(tmp_path / "bad.jsonl", ['{"text": "1"}', "oops"])
    monkeypatch.chdir(tmp_path)
    try:
        returned: Any = preprocess_data.main(list(map(str, arguments)))
    except SystemExit as stop:
        returned = stop.code
    message = capsys.readouterr().err
    assert returned == code, message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def interruptible() -> None:
    """A shell starts its background jobs with SIGINT ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running_tool(folder: Path) -> Iterator[tuple[subprocess.Popen[str], TextIO]]:
    """The tool at work with two workers, and the stream of its input, which does not end by itself."""
    os.mkfifo(folder / "in.jsonl")
    command = [sys.executable, str(TOOL), "--input", str(folder / "in.jsonl"), "--workers", "2", "--log-interval", "1",
               "--checkpoint-seconds", "3600"]
    with (open(os.open(folder / "in.jsonl", os.O_RDWR), "w", encoding="utf-8") as stream,
          subprocess.Popen([*command, *map(str, COMMON)], cwd=folder, stderr=subprocess.PIPE, text=True,
                           preexec_fn=interruptible) as run):
        stream.write("".join(f"{line}\n" for line in number_lines(5, 5000)) * 8)
        stream.flush()
        assert run.stderr is not None
        assert "Processed" in (line := run.stderr.readline()), line + run.stderr.read()
        yield run, stream


def feed(stream: TextIO, run: subprocess.Popen[str]) -> None:
    """Write input, as fast as it is read, until the run has ended."""
    lines, at = "".join(f"{line}\n" for line in number_lines(6, 5000)).encode(), 0
    os.set_blocking(stream.fileno(), False)
    while run.poll() is None:
        try:
            at += os.write(stream.fileno(), lines[at % len(lines):])
        except BlockingIOError:
            time.sleep(0.01)


@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_worker_ends_the_run_with_a_message(tmp_path: Path) -> None:
    with running_tool(tmp_path) as (run, stream):
        # Workers, and the helper of multiprocessing that looks after its semaphores, which is not killed.
        workers = [pid for pid in children(run.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[0], signal.SIGKILL)
        feed(stream, run)  # it sees the end of the worker's pipe while there is work for it
        message = run.stderr.read() if run.stderr is not None else ""
    assert run.wait(timeout=200) == 21, message
    assert "DataError: A worker process was killed" in message and "--workers" in message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_corpus_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    with running_tool(tmp_path) as (run, _):
        workers = children(run.pid)
        assert len(workers) >= 2
        run.send_signal(number)
        assert run.wait(timeout=200) != 0
    deadline = time.monotonic() + 60
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.05)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ([] if number == signal.SIGINT else ["c_text_document.bin.partial"])
