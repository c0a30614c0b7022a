from pathlib import Path

import numpy as np
import pytest

from megatron_ltd.data.corpus import merge
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.manifest import manifest_path, read_manifest, verify_manifest
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from tests.data.corpora import described, random_sentences, write_corpus, write_sentences
from tools import merge_datasets


def parts(folder: Path, vocab_size: int = 900) -> list[IndexedCorpus]:
    """Corpora with empty documents, at their ends too, and one without a document."""
    folder.mkdir(exist_ok=True)
    documents = [random_sentences(seed, 30, 4, 30, vocab_size) for seed in range(3)]
    documents[1] = [[], *documents[1], [], []]
    documents[2] = []
    return [write_sentences(folder / f"p{number}", part, vocab_size) for number, part in enumerate(documents)]


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
@pytest.mark.parametrize("vocab_size", [900, 70000])
def test_bytes_are_those_of_megatron_cores_builder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, vocab_size: int) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    monkeypatch.setattr(merge, "_CHUNK_TOKENS", chunk)
    corpora = parts(tmp_path / "in", vocab_size)
    order = [1, 0, 2, 1]
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), indexed.DType.optimal_dtype(vocab_size))
    for number in order:
        builder.add_index(corpora[number].prefix)
    builder.finalize(str(tmp_path / "m.idx"))
    assert merge_datasets.main(["--input", *(corpora[number].prefix for number in order), "--output-prefix",
                                str(tmp_path / "out" / "all")]) == 0
    for suffix in ("bin", "idx"):
        assert (tmp_path / "out" / f"all.{suffix}").read_bytes() == (tmp_path / f"m.{suffix}").read_bytes()
    assert not Path(manifest_path(str(tmp_path / "out" / "all"))).exists()


def test_documents_follow_each_other(tmp_path: Path) -> None:
    corpora = parts(tmp_path / "in")
    merged = merge.merge_corpora([corpus.prefix for corpus in corpora], str(tmp_path / "all"))
    expected = [corpus.read(i).tolist() for corpus in corpora for i in range(len(corpus))]
    assert [merged.read(i).tolist() for i in range(len(merged))] == expected
    assert np.diff(merged.document_indices).tolist() == [
        count for corpus in corpora for count in np.diff(corpus.document_indices).tolist()]


def test_a_folder_stands_for_the_corpora_in_it_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts(tmp_path / "in")
    assert merge_datasets.main(["--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "all")]) == 0
    assert "from 3 corpora: 63 documents" in capsys.readouterr().out
    again = merge.merge_corpora([str(tmp_path / "in" / f"p{n}") for n in range(3)], str(tmp_path / "again"))
    assert again.content_digest == IndexedCorpus(str(tmp_path / "all")).content_digest
    (tmp_path / "in" / "p1.bin").unlink()
    assert merge_datasets.main(["--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "all")]) == 21
    assert "no file p1.bin" in capsys.readouterr().err


def test_manifests_are_merged_and_what_is_not_known_stays_so(tmp_path: Path) -> None:
    corpora = parts(tmp_path / "in")
    for corpus in corpora[:2]:
        described(corpus, "digest", 900)
    some = merge.merge_corpora([corpus.prefix for corpus in corpora], str(tmp_path / "some"))
    manifest = verify_manifest(some, "another")
    assert manifest is not None and manifest.tokenizer is None and manifest.vocab_size is None
    described(corpora[2], "digest", 900)
    merged = merge.merge_corpora([corpus.prefix for corpus in corpora], str(tmp_path / "all"))
    manifest = verify_manifest(merged, "digest")
    assert manifest is not None and (manifest.tokenizer, manifest.vocab_size) == ("digest", 900)
    assert [part["prefix"] for part in manifest.settings["merged"]] == [corpus.prefix for corpus in corpora]


def test_what_does_not_fit_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow, wide = write_corpus(tmp_path / "narrow", [[1, 2]], 900), write_corpus(tmp_path / "wide", [[1, 2]], 70000)
    other = write_corpus(tmp_path / "other", [[3]], 900)
    described(narrow, "one", 900)
    described(other, "two", 900)
    for prefixes, code, words in (((narrow, wide), 21, "wide holds tokens of type int32, and"),
                                  ((narrow, other), 21, "other was written with another tokenizer than"),
                                  ((wide, other), 21, "of type uint16"),
                                  ((wide, wide), 20, "is one of the corpora to merge")):
        output = wide.prefix if code == 20 else str(tmp_path / "out")
        assert merge_datasets.main(["--input", *(corpus.prefix for corpus in prefixes), "--output-prefix",
                                    output]) == code
        assert words in capsys.readouterr().err
    with IndexedCorpusWriter(str(tmp_path / "bytes"), dtype=np.dtype("u1")) as writer:
        writer.add_document([7])
    assert merge_datasets.main(["--input", str(tmp_path / "bytes"), "--output-prefix", str(tmp_path / "out")]) == 0
    Path(narrow.prefix + ".idx").write_bytes(b"MMIDIDX")
    assert merge_datasets.main(["--input", narrow.prefix, "--output-prefix", str(tmp_path / "none")]) == 21
    assert not list(tmp_path.glob("none*")) and read_manifest(str(tmp_path / "none")) is None
