from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from megatron_ltd.data.gpt.dataset import GPTDataset
from megatron_ltd.data.mock_dataset import MockDataset
from megatron_ltd.data.sample import GPTSampleForm
from megatron_ltd.errors import DataError
from tests.data.corpora import random_documents, write_corpus

EOD = 3


def test_samples_equal_megatron_cores(oracle: ModuleType, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_documents(1, 60, 50, 1000), 1000)
    for samples, seq_length, seed in [(40, 32, 1), (200, 16, 2), (None, 64, 3), (300, 7, 4)]:
        config = oracle.gpt_config(seed, seq_length, tmp_path / "cache", reset_position_ids=True, eod_mask_loss=True)
        theirs = oracle.gpt_dataset(tmp_path / "c", range(5, 55), samples, config)
        form = GPTSampleForm(seq_length, 1000, EOD, eod_mask_loss=True, reset_position_ids=True)
        ours = GPTDataset(corpus, range(5, 55), samples, seed, form)
        assert len(ours) == len(theirs)
        for i in range(len(ours)):
            sample, reference = ours.sample(i), theirs[i]
            assert sample.keys() == reference.keys()
            for name, array in sample.items():
                assert array.tolist() == reference[name].tolist(), (i, name)


def test_documents_that_may_attend_to_each_other_equal_megatron_cores(oracle: ModuleType, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_documents(2, 60, 20, 9), 9)
    config = oracle.gpt_config(1, 24, tmp_path / "cache", reset_attention_mask=True, create_attention_mask=True)
    theirs = oracle.gpt_dataset(tmp_path / "c", range(60), 20, config)
    ours = GPTDataset(corpus, range(60), 20, 1, GPTSampleForm(24, 9, EOD, reset_attention_mask=True))
    several = 0
    for i in range(len(ours)):
        documents = ours.sample(i)["document_ids"]
        several += documents.max() > 0
        allowed = (documents[:, None] == documents[None, :]) & np.tri(24, dtype=bool)
        assert (allowed == ~theirs[i]["attention_mask"][0].numpy()).all()
    assert several > 5


def test_a_sample_worked_out_by_hand() -> None:
    text = np.array([7, 3, 8, 9, 3, 3, 5])
    plain = GPTSampleForm(6, 10, EOD).arrays(text)
    assert plain.keys() == {"tokens", "labels", "loss_mask"}
    assert plain["tokens"].tolist() == [7, 3, 8, 9, 3, 3]
    assert plain["labels"].tolist() == [3, 8, 9, 3, 3, 5]
    assert plain["loss_mask"].tolist() == [1, 1, 1, 1, 1, 1]
    form = GPTSampleForm(6, 10, EOD, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
    full = form.arrays(text)
    assert full["loss_mask"].tolist() == [1, 0, 1, 1, 0, 0]
    assert full["position_ids"].tolist() == [0, 1, 0, 1, 2, 0]
    assert full["document_ids"].tolist() == [0, 0, 1, 1, 1, 2]
    assert {array.dtype.name for name, array in full.items() if name != "loss_mask"} == {"int64"}
    assert full["loss_mask"].dtype == np.float32


def test_only_the_samples_outside_the_corpus_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [list(range(90))], 100)
    dataset = GPTDataset(corpus, range(1), 2, 1, GPTSampleForm(8, 100, EOD))
    assert len(dataset.text(len(dataset) - 1)) == 9
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset.sample(index)


def test_a_token_that_the_tokenizer_does_not_have_is_an_error(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1, 2, 3, 4, 5, 150, 7, 8, 9]], 200)
    dataset = GPTDataset(corpus, range(1), 2, 1, GPTSampleForm(4, 100, EOD))
    with pytest.raises(DataError, match=rf"{tmp_path}/c holds token id = 150, .* ids in \[0, 100\)"):
        [dataset.sample(0), dataset.sample(1)]


def test_a_negative_token_is_an_error(tmp_path: Path) -> None:
    with IndexedCorpusWriter(str(tmp_path / "c")) as writer:
        writer.add_document([1] * 9)
    (tmp_path / "c.bin").write_bytes(np.full(9, -2, dtype="<i4").tobytes())
    corpus = write_corpus(tmp_path / "other", [[1] * 9])
    corpus = type(corpus)(str(tmp_path / "c"))
    with pytest.raises(DataError, match="token id = -2"):
        GPTDataset(corpus, range(1), 2, 1, GPTSampleForm(4, 100, EOD)).sample(0)


def test_a_corpus_shorter_than_one_sample_is_refused_with_the_numbers(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", [[1] * 5, [2] * 4, [3] * 50], 100)
    assert len(GPTDataset(corpus, range(0, 2), 1, 1, GPTSampleForm(8, 100, EOD))) == 1
    with pytest.raises(DataError, match=r"sequences \[0, 2\) of 3 hold 9 tokens, and one sample takes 10"):
        GPTDataset(corpus, range(0, 2), 1, 1, GPTSampleForm(9, 100, EOD))


def cached(tmp_path: Path, seed: int = 1) -> list[list[int]]:
    """All samples of a small dataset, with its index in `cache`."""
    corpus = write_corpus(tmp_path / "c", random_documents(9, 30, 30, 100), 100)
    dataset = GPTDataset(corpus, range(30), 60, seed, GPTSampleForm(8, 100, EOD), str(tmp_path / "cache"))
    return [dataset.text(i).tolist() for i in range(len(dataset))]


def test_a_cached_index_is_used_and_gives_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached(tmp_path)
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1

    def refuse(*_: object) -> None:
        raise RuntimeError("the index was built again")

    monkeypatch.setattr("megatron_ltd.data.gpt.dataset.build_gpt_index", refuse)
    assert cached(tmp_path) == first
    with pytest.raises(RuntimeError, match="built again"):
        cached(tmp_path, seed=2)


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:-1], lambda data: data[:40], lambda data: data + b"\0",
    lambda data: bytes(len(data)), lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    lambda data: data[:-1] + bytes([data[-1] ^ 0x80]), lambda data: data[:31] + bytes([data[31] ^ 1]) + data[32:],
], ids=["empty", "cut", "cut early", "tail", "zeros", "flip in a header", "flip in an array", "flip in the checksum"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    first = cached(tmp_path)
    (file,) = (tmp_path / "cache").glob("*.index")
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    assert cached(tmp_path) == first
    assert file.read_bytes() == sound


def test_the_cache_of_another_dataset_under_the_same_name_is_not_used(tmp_path: Path) -> None:
    first = cached(tmp_path)
    (file,) = (tmp_path / "cache").glob("*.index")
    assert cached(tmp_path, seed=2) != first
    (other,) = set((tmp_path / "cache").glob("*.index")) - {file}
    file.write_bytes(other.read_bytes())
    assert cached(tmp_path) == first


def test_a_corpus_that_was_written_again_gets_a_new_index(tmp_path: Path) -> None:
    cached(tmp_path)
    corpus = write_corpus(tmp_path / "c", random_documents(10, 12, 30, 100), 100)
    dataset = GPTDataset(corpus, range(12), 60, 1, GPTSampleForm(8, 100, EOD), str(tmp_path / "cache"))
    fresh = GPTDataset(corpus, range(12), 60, 1, GPTSampleForm(8, 100, EOD))
    assert [dataset.text(i).tolist() for i in range(60)] == [fresh.text(i).tolist() for i in range(60)]


def test_a_cache_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"--data-cache-path = .*cache cannot be used"):
        cached(tmp_path)


def test_the_digest_tells_datasets_apart(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_documents(9, 30, 30, 100), 100)
    form = GPTSampleForm(8, 100, EOD)
    parts = [(range(30), 60, 1, form), (range(29), 60, 1, form), (range(30), 61, 1, form), (range(30), 60, 2, form),
             (range(30), 60, 1, GPTSampleForm(8, 100, EOD, eod_mask_loss=True)),
             (range(30), 60, 1, GPTSampleForm(9, 100, EOD))]
    assert len({GPTDataset(corpus, *part).digest for part in parts}) == len(parts)
    assert GPTDataset(corpus, *parts[0]).digest == GPTDataset(corpus, *parts[0]).digest


def test_mock_samples_depend_on_seed_split_and_index_alone() -> None:
    form = GPTSampleForm(16, 1000, EOD)
    dataset = MockDataset(0, 100, 5, form)
    samples = {i: dataset.text(i).tolist() for i in range(100)}
    again = MockDataset(0, 5000, 5, form)
    assert all(again.text(i).tolist() == samples[i] for i in reversed(range(100)))
    assert len({tuple(sample) for sample in samples.values()}) == 100
    assert MockDataset(1, 100, 5, form).text(0).tolist() != samples[0]
    assert MockDataset(0, 100, 6, form).text(0).tolist() != samples[0]
    tokens = np.concatenate(list(samples.values()))
    assert tokens.min() >= 0 and tokens.max() < 1000
    assert len(np.unique(tokens)) > 700
    assert dataset.sample(7)["labels"].tolist() == samples[7][1:]
    with pytest.raises(IndexError):
        dataset.sample(100)
