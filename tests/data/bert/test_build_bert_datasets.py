"""BERT's training, validation and test sets, as a run builds them."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.data.bert.masking import MaskingSettings
from megatron_ltd.data.build import build_datasets, datasets_digest
from megatron_ltd.data.loader import read_microbatch
from megatron_ltd.data.text.tokenizer import MaskedTokenizer, NullTokenizer, build_tokenizer
from megatron_ltd.data.text.wordpiece import SPECIAL_TOKENS, MaskedVocabulary
from megatron_ltd.errors import ConfigError, DataError
from tests.data.bert.test_bert_dataset import assert_same
from tests.data.corpora import random_documents, random_sentences, write_corpus, write_sentences

SEQ_LENGTH, VOCAB_SIZE, PREDICTIONS = 32, 60, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentence corpora a (80 documents), b (50), c (30), a corpus of documents d, and a vocab.txt of 60 tokens."""
    path = tmp_path_factory.mktemp("corpora")
    for seed, (name, documents) in enumerate([("a", 80), ("b", 50), ("c", 30)]):
        write_sentences(path / name, random_sentences(seed, documents, 8, 20, VOCAB_SIZE), VOCAB_SIZE)
    write_corpus(path / "d", random_documents(4, 20, 40, VOCAB_SIZE), VOCAB_SIZE)
    words = [f"w{i}" if i % 3 else f"##w{i}" for i in range(VOCAB_SIZE - len(SPECIAL_TOKENS))]
    (path / "vocab.txt").write_text("".join(f"{token}\n" for token in (*SPECIAL_TOKENS, *words)))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> MaskedTokenizer:
    built = build_tokenizer(DataConfig(tokenizer_type="BertWordPieceCase", vocab_file=str(folder / "vocab.txt")), None)
    assert isinstance(built, MaskedTokenizer)
    return built


def config(folder: Path, *values: str, binary_head: bool = True, seed: int = 1234, seq_length: int = SEQ_LENGTH,
           **data: Any) -> RunConfig:
    paths = tuple(str(folder / value) if len(value) == 1 and value.isalpha() else value for value in values)
    model = ModelConfig(family="bert", seq_length=seq_length, bert_no_binary_head=not binary_head)
    return RunConfig(model=model, training=TrainingConfig(seed=seed),
                     data=DataConfig(data_path=paths or None, **{"split": "80,15,5", **data}))


@pytest.mark.parametrize(("values", "samples", "binary_head"), [
    (("a",), (300, 20, 5), True),
    (("a",), (300, 20, 5), False),
    (("0.3", "a", "0.7", "b"), (200, 20, 5), True),
    (("5", "a", "3", "b", "2", "c"), (300, 40, 5), False),
])
def test_sets_equal_megatron_cores(bert_oracle: ModuleType, folder: Path, tokenizer: MaskedTokenizer, tmp_path: Path,
                                   values: tuple[str, ...], samples: tuple[int, int, int], binary_head: bool) -> None:
    run = config(folder, *values, binary_head=binary_head, mask_prob=0.15, mask_max_ngram=2, short_seq_prob=0.2)
    vocabulary = MaskedVocabulary(VOCAB_SIZE, 0, 2, 3, 4, tokenizer.continues_word)
    assert run.data.data_path is not None
    reference = bert_oracle.build(list(samples), bert_oracle.config(
        vocabulary, MaskingSettings(max_ngram=2), SEQ_LENGTH, 1234, tmp_path, 0.2, binary_head,
        blend=bert_oracle.blend(run.data.data_path), split=run.data.split))
    ours = build_datasets(run, tokenizer, *samples, PREDICTIONS)
    for mine, theirs, asked in zip(ours, reference, samples, strict=True):
        assert mine is not None and len(mine) == len(theirs) >= asked
        for i in range(0, len(mine), 3):
            assert_same(mine.sample(i), theirs[i])


def test_a_microbatch_has_the_shapes_that_the_model_takes(folder: Path, tokenizer: MaskedTokenizer) -> None:
    train = build_datasets(config(folder, "a"), tokenizer, 50, 0, 0, PREDICTIONS).train
    batch = read_microbatch(train, range(4, 7))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "tokens": (torch.int64, (3, SEQ_LENGTH)), "padding_mask": (torch.bool, (3, SEQ_LENGTH)),
        "token_types": (torch.int64, (3, SEQ_LENGTH)), "predicted_positions": (torch.int64, (3, PREDICTIONS)),
        "labels": (torch.int64, (3, PREDICTIONS)), "loss_mask": (torch.float32, (3, PREDICTIONS)),
        "sentence_order": (torch.int64, (3,)), "sample_ids": (torch.int64, (3,))}


@pytest.mark.parametrize("binary_head", [True, False])
def test_made_up_data_needs_neither_corpus_nor_wordpiece(folder: Path, binary_head: bool) -> None:
    run = config(folder, binary_head=binary_head, mock_data=True)
    ours = build_datasets(run, NullTokenizer(999), 50, 5, 0, PREDICTIONS)
    assert (len(ours.train), ours.test) == (50, None) and ours.valid is not None
    sample = ours.train.sample(7)
    assert ("token_types" in sample) == binary_head
    assert sample["padding_mask"].sum() == SEQ_LENGTH - (0 if binary_head else 1), "one segment has one [SEP]"
    assert 0 <= sample["tokens"].min() and sample["tokens"].max() < 1000
    assert ours.valid.sample(7 % 5)["tokens"].tolist() != ours.train.sample(7 % 5)["tokens"].tolist()


def test_the_digest_follows_the_settings_of_masking(folder: Path, tokenizer: MaskedTokenizer) -> None:
    def digest(**changes: Any) -> str:
        run = config(folder, "1", "a", "2", "b", **changes)
        return datasets_digest(tokenizer, build_datasets(run, tokenizer, 50, 5, 0, PREDICTIONS))

    others = [digest(mask_prob=0.1), digest(mask_max_ngram=2), digest(mask_whole_word=False), digest(seed=2),
              digest(mask_longer_ngrams=True), digest(mask_geometric=True), digest(short_seq_prob=0.3),
              digest(binary_head=False)]
    assert digest() == digest() and len({digest(), *others}) == 1 + len(others)


@pytest.mark.parametrize(("values", "settings", "kind", "words"), [
    (("d",), {}, DataError, ["d holds whole documents", "--split-sentences", "_sentence"]),
    (("nowhere",), {}, DataError, ["no file nowhere.idx"]),
    (("c",), {"split": "969,30,1"}, DataError, ["The test set is empty", "documents [30, 30) of the 30"]),
    (("c",), {"seq_length": 4}, ConfigError, ["--seq-length = 4: a BERT sample takes at least 5"]),
    (("c",), {"seq_length": 9}, ConfigError, ["--mask-prob = 0.15", "6 tokens", "--seq-length = 9", "raise"]),
    ((), {}, ConfigError, ["No data"]),
])
def test_data_that_cannot_serve_bert_is_refused(
        folder: Path, tokenizer: MaskedTokenizer, values: tuple[str, ...], settings: dict[str, Any],
        kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        build_datasets(config(folder, *values, **settings), tokenizer, 10, 5, 5, PREDICTIONS)
    for word in words:
        assert word in str(caught.value)


def test_a_tokenizer_without_a_mask_token_is_refused(folder: Path) -> None:
    run = config(folder, "a", tokenizer_type="NullTokenizer")
    with pytest.raises(ConfigError, match=r"--tokenizer-type = NullTokenizer: it has no \[CLS\].*BertWordPieceLowerC"):
        build_datasets(run, NullTokenizer(999), 10, 0, 0, PREDICTIONS)
    with pytest.raises(ConfigError, match="at least 5 token ids"):
        build_datasets(config(folder, mock_data=True), NullTokenizer(3), 10, 0, 0, PREDICTIONS)


def test_a_corpus_of_another_vocabulary_is_refused(tmp_path: Path, folder: Path, tokenizer: MaskedTokenizer) -> None:
    write_sentences(tmp_path / "a", random_sentences(1, 20, 5, 9, 500), 500)
    with pytest.raises(DataError, match=r"holds token id = \d+, .* \[0, 60\)"):
        build_datasets(config(tmp_path, "a"), tokenizer, 10, 0, 0, PREDICTIONS)


def test_every_prediction_is_a_token_that_stood_in_the_text(folder: Path, tokenizer: MaskedTokenizer) -> None:
    train = build_datasets(config(folder, "b"), tokenizer, 60, 0, 0, PREDICTIONS).train
    shares = []
    for i in range(len(train)):
        sample = train.sample(i)
        count = int(sample["loss_mask"].sum())
        assert (sample["labels"][:count] >= len(SPECIAL_TOKENS)).all()
        shares.append(count / sample["padding_mask"].sum())
    assert 0.08 < np.mean(shares) < 0.16
