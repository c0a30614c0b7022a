import dataclasses
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_ltd.data.bert.dataset import BertDataset, BertSampleForm
from megatron_ltd.data.bert.masking import Masker, MaskingSettings
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.mock_dataset import MockBertDataset
from megatron_ltd.data.sample import Sample
from megatron_ltd.data.text.wordpiece import MaskedVocabulary
from megatron_ltd.errors import DataError
from tests.data.corpora import random_documents, random_sentences, write_corpus, write_sentences

PAD, UNK, CLS, SEP, MASK = range(5)


def vocabulary(size: int = 1000, share: float = 0.4, seed: int = 5) -> MaskedVocabulary:
    """A vocabulary of which so many pieces continue words."""
    continues = np.random.default_rng(seed).random(size) < share
    continues[:5] = False
    return MaskedVocabulary(size, PAD, CLS, SEP, MASK, continues)


def form(seq_length: int = 64, masking: MaskingSettings | None = None, binary_head: bool = True,
         short_seq_prob: float = 0.1, words: MaskedVocabulary | None = None) -> BertSampleForm:
    masking = masking or MaskingSettings()
    return BertSampleForm(seq_length, max(1, round(masking.mask_prob * seq_length)), words or vocabulary(), masking,
                          binary_head, short_seq_prob)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> IndexedCorpus:
    return write_sentences(tmp_path_factory.mktemp("corpus") / "c", random_sentences(1, 60, 12, 30, 1000), 1000)


def assert_same(mine: Sample, theirs: dict[str, Any]) -> None:
    """One of our samples against one of megatron-core's, which holds predictions at their positions."""
    length = int(mine["padding_mask"].sum())
    assert mine["tokens"].tolist() == theirs["text"].tolist()
    real = theirs["padding_mask"].astype(bool)
    assert (mine["padding_mask"] == (real | (np.arange(len(real)) < length))).all()
    assert (mine["tokens"][mine["padding_mask"] & ~real] == PAD).all(), "only a [PAD] in the text may differ"
    count = int(mine["loss_mask"].sum())
    assert mine["predicted_positions"][:count].tolist() == np.flatnonzero(theirs["loss_mask"]).tolist()
    assert mine["labels"][:count].tolist() == theirs["labels"][theirs["loss_mask"] == 1].tolist()
    assert not mine["predicted_positions"][count:].any() and not mine["labels"][count:].any()
    assert mine["loss_mask"].tolist() == [1.0] * count + [0.0] * (len(mine["labels"]) - count)
    if "token_types" in mine:
        assert mine["token_types"].tolist() == theirs["types"].tolist()
        assert int(mine["sentence_order"]) == theirs["is_random"]
    else:
        assert theirs["is_random"] == 0


def test_samples_equal_megatron_cores_in_many_configurations(bert_oracle: ModuleType, tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    seen = set()
    for trial in range(60):
        binary = bool(random.integers(2))
        masking = MaskingSettings(float(random.choice([0.15, 0.3, 0.02, 0.8])), int(random.integers(1, 5)),
                                  bool(random.integers(2)), bool(random.integers(2)), bool(random.integers(2)))
        words = vocabulary(int(random.choice([12, 300])), float(random.choice([0.0, 0.4, 0.9])), trial)
        seq_length, seed = int(random.integers(5, 150)), int(random.integers(0, 2**31 - 2))
        short = float(random.choice([0.0, 0.1, 0.5, 1.0]))
        documents = random_sentences(trial, 20, 9, 25, words.size) + [[[5, 6], [7, 8]]]
        corpus = write_sentences(tmp_path / str(trial), documents, words.size)
        part = range(int(random.integers(0, 10)), len(documents))
        theirs = bert_oracle.dataset(tmp_path / str(trial), part, 40, bert_oracle.config(
            words, masking, seq_length, seed, tmp_path / "cache", short, binary))
        ours = BertDataset(corpus, part, 40, seed, form(seq_length, masking, binary, short, words))
        assert len(ours) == len(theirs) >= 40
        for i in range(0, len(ours), 2):
            assert_same(ours.sample(i), theirs[i])
        seen.add((binary, masking.geometric, masking.longer_ngrams, masking.whole_word))
    assert len(seen) >= 14, "some kind of masking was not compared"


GOLDEN = {
    (True, MaskingSettings()):
        "dbefe810b91f4210bbfc796536479c2e8acc7df13fff58fbdbf85be926998d6d",
    (False, MaskingSettings()):
        "4feffc977815369ae9a1bc8784516b15db00b257434a4310307c767532aeede3",
    (True, MaskingSettings(0.3, 4, longer_ngrams=True)):
        "8e5e0d063417b68d2e07b49ada8ce0423275d65674d44ce38b1f3d8286dd7ea3",
    (True, MaskingSettings(0.15, 6, geometric=True)):
        "42bb6a414503eea017bd7547537dea4b0f67974a7f8abe8d8b2e605d4847473f",
    (True, MaskingSettings(0.15, 1, whole_word=False)):
        "5e832377cd73497e0f1363d8fdf0b4ffeb72c60636ab24193830be518dea3752",
}
"""SHA-256 of the first 50 samples that megatron-core 0.16.1 makes of `corpus` with seed 1234: text, predicted
positions, labels, segments, order."""


def digest(dataset: BertDataset) -> str:
    sha = hashlib.sha256()
    for i in range(50):
        sample = dataset.sample(i)
        count = int(sample["loss_mask"].sum())
        for array in (sample["tokens"], sample["predicted_positions"][:count], sample["labels"][:count],
                      sample.get("token_types", np.zeros(0)), sample.get("sentence_order", np.zeros(0))):
            sha.update(array.astype("<i8").tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize(("binary_head", "masking"), list(GOLDEN))
def test_samples_are_the_recorded_ones_of_megatron_core(corpus: IndexedCorpus, binary_head: bool,
                                                        masking: MaskingSettings) -> None:
    dataset = BertDataset(corpus, range(60), 100, 1234, form(64, masking, binary_head))
    assert digest(dataset) == GOLDEN[binary_head, masking]


def test_names_types_and_shapes_are_those_that_the_model_takes(corpus: IndexedCorpus) -> None:
    expected = {"tokens": ("int64", (64,)), "padding_mask": ("bool", (64,)), "predicted_positions": ("int64", (10,)),
                "labels": ("int64", (10,)), "loss_mask": ("float32", (10,)), "token_types": ("int64", (64,)),
                "sentence_order": ("int64", ())}
    sample = BertDataset(corpus, range(60), 10, 1, form()).sample(0)
    assert {name: (str(array.dtype), array.shape) for name, array in sample.items()} == expected
    alone = BertDataset(corpus, range(60), 10, 1, form(binary_head=False)).sample(0)
    assert alone.keys() == expected.keys() - {"token_types", "sentence_order"}


def test_a_sample_is_a_function_of_its_index(corpus: IndexedCorpus) -> None:
    first, second = (BertDataset(corpus, range(60), 40, 3, form()) for _ in range(2))
    backwards = {i: second.sample(i) for i in reversed(range(40))}
    for i in range(40):
        assert all((first.sample(i)[name] == array).all() for name, array in backwards[i].items())


def test_a_sample_holds_its_sentences_with_the_predicted_tokens_put_back(corpus: IndexedCorpus) -> None:
    dataset = BertDataset(corpus, range(60), 60, 3, form())
    swapped = set()
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        count, length = int(sample["loss_mask"].sum()), int(sample["padding_mask"].sum())
        restored = sample["tokens"].copy()
        restored[sample["predicted_positions"][:count]] = sample["labels"][:count]
        assert (restored[length:] == PAD).all() and not sample["padding_mask"][length:].any()
        ends = np.flatnonzero(restored == SEP).tolist()
        assert restored[0] == CLS and len(ends) == 2 and ends[1] == length - 1
        types = [0] * (ends[0] + 1) + [1] * (length - ends[0] - 1) + [0] * (64 - length)
        assert sample["token_types"].tolist() == types
        assert not {0, *ends} & set(sample["predicted_positions"][:count].tolist())
        first, end, target = dataset.mapping[i].tolist()
        assert length - 3 == min(target, int(corpus.sequence_lengths[first:end].sum()))
        text = f" {' '.join(map(str, corpus.read_sequences(first, end).tolist()))} "
        for segment in (restored[1:ends[0]], restored[ends[0] + 1:ends[1]]):
            assert f" {' '.join(map(str, segment.tolist()))} " in text
        swapped.add(int(sample["sentence_order"]))
    assert swapped == {0, 1}


def test_whole_words_are_predicted_together(corpus: IndexedCorpus) -> None:
    words = vocabulary()
    masker = Masker(MaskingSettings(0.3), words)
    tokens = np.array([CLS, *random_documents(3, 1, 90, 1000)[0], SEP], dtype=np.int64)
    _, positions = masker.mask(tokens, 90, np.random.RandomState(1))
    chosen = set(positions.tolist())
    assert chosen
    for position in range(2, len(tokens) - 1):
        if words.continues_word[tokens[position]]:
            assert (position in chosen) == (position - 1 in chosen)


def test_eighty_percent_become_the_mask_token_ten_stay_ten_are_replaced() -> None:
    words = vocabulary(100_000)
    tokens = np.arange(5, 100_000, dtype=np.int64)
    masked, positions = Masker(MaskingSettings(0.2), words).mask(tokens, len(tokens), np.random.RandomState(1))
    found, original = masked[positions], tokens[positions]
    count = len(positions)
    assert count == int(0.2 * len(tokens))
    assert abs((found == MASK).mean() - 0.8) < 4 * (0.8 * 0.2 / count) ** 0.5
    assert abs((found == original).mean() - 0.1) < 4 * (0.1 * 0.9 / count) ** 0.5
    untouched = np.ones(len(tokens), dtype=bool)
    untouched[positions] = False
    assert (masked[untouched] == tokens[untouched]).all()


def test_there_are_never_more_predictions_than_places() -> None:
    random = np.random.default_rng(3)
    for trial in range(200):
        seq_length, share = int(random.integers(5, 600)), float(random.uniform(0.001, 0.999))
        settings = form(seq_length, MaskingSettings(share), words=vocabulary(50))
        text = random.integers(5, 50, settings.longest)
        sample = settings.arrays(text, np.array([1, len(text) - 1], dtype=np.int32), settings.longest,
                                 np.random.RandomState(trial))
        assert sample["loss_mask"].sum() <= max(1, share * settings.longest)


def test_too_few_places_for_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="predictions = 8 are too few"):
        BertSampleForm(64, 8, vocabulary())


def test_a_corpus_of_whole_documents_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", random_documents(1, 20, 30, 1000), 1000)
    for binary_head in (True, False):
        with pytest.raises(DataError, match=r"c holds whole documents \(20 sequences in 20 documents\), .*"
                                            "--split-sentences"):
            BertDataset(corpus, range(20), 10, 1, form(binary_head=binary_head))


def test_a_part_without_a_sample_is_refused(tmp_path: Path) -> None:
    corpus = write_sentences(tmp_path / "c", [[[5, 6], [7]], [[8]], [[9] * 513, [5]]], 1000)
    with pytest.raises(DataError, match=r"c, documents \[1, 3\) of 3: None of 2 documents .*512 tokens"):
        BertDataset(corpus, range(1, 3), 10, 1, form())


def test_a_token_that_the_tokenizer_does_not_have_is_an_error(tmp_path: Path) -> None:
    corpus = write_sentences(tmp_path / "c", [[[5, 999], [7]]], 1000)
    dataset = BertDataset(corpus, range(1), 1, 1, form(words=vocabulary(900)))
    with pytest.raises(DataError, match=r"holds token id = 999, .* \[0, 900\)"):
        dataset.sample(0)


def test_samples_do_not_depend_on_the_cache(corpus: IndexedCorpus, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BertDataset(corpus, range(60), 40, 3, form())
    BertDataset(corpus, range(60), 40, 3, form(), str(tmp_path))

    def refuse(*_: object) -> None:
        raise RuntimeError("the mapping was built again")

    monkeypatch.setattr("megatron_ltd.data.bert.dataset.build_mapping", refuse)
    cached = BertDataset(corpus, range(60), 40, 3, form(), str(tmp_path))
    assert (cached.mapping == plain.mapping).all() and cached.digest == plain.digest
    with pytest.raises(RuntimeError, match="built again"):
        BertDataset(corpus, range(60), 40, 4, form(), str(tmp_path))


def test_the_digest_follows_all_that_decides_samples(corpus: IndexedCorpus) -> None:
    def value(seed: int = 1, samples: int = 40, **changes: Any) -> str:
        return BertDataset(corpus, range(60), samples, seed, dataclasses.replace(form(), **changes)).digest

    others = [value(2), value(samples=200), value(seq_length=63), value(binary_head=False), value(short_seq_prob=0.2),
              value(masking=MaskingSettings(max_ngram=2)), value(predictions=11)]
    assert value() == value() and len({value(), *others}) == 1 + len(others)


def test_made_up_samples_fill_the_sequence() -> None:
    dataset = MockBertDataset(0, 20, 1, form())
    samples = [dataset.sample(i) for i in range(20)]
    assert all(sample["padding_mask"].all() and sample["loss_mask"].sum() == 9 for sample in samples)
    assert {int(sample["sentence_order"]) for sample in samples} == {0, 1}
    assert (dataset.sample(3)["tokens"] == MockBertDataset(0, 20, 1, form()).sample(3)["tokens"]).all()
    assert MockBertDataset(1, 20, 1, form()).sample(3)["tokens"].tolist() != samples[3]["tokens"].tolist()
    assert "sentence_order" not in MockBertDataset(0, 20, 1, form(binary_head=False)).sample(0)
