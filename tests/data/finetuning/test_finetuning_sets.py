"""A corpus read for whole epochs: every sample of every part once, and whole batches of held-out ones."""

from collections import Counter
from pathlib import Path

import pytest

from megatron_ltd.config.files import DataConfig, LoggingConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.data.finetuning.build import describe, of_epochs, text_epoch
from megatron_ltd.data.sample import Dataset
from megatron_ltd.data.text.tokenizer import NullTokenizer
from megatron_ltd.errors import DataError
from tests.data.corpora import random_documents, write_corpus

VOCABULARY, LENGTH = 50, 8


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[str, str]:
    for number, name in enumerate(("a", "b")):
        documents = random_documents(number, 40, 30, VOCABULARY, VOCABULARY)
        write_corpus(tmp_path / name, documents, VOCABULARY + 1)
    return str(tmp_path / "a"), str(tmp_path / "b")


def settings(data: DataConfig, eval_iters: int = 5) -> RunConfig:
    return RunConfig(model=ModelConfig(seq_length=LENGTH), data=data, training=TrainingConfig(seed=3),
                     logging=LoggingConfig(eval_iters=eval_iters))


def text(dataset: Dataset, index: int) -> tuple[int, ...]:
    sample = dataset.sample(index)
    return (*sample["tokens"].tolist(), *sample["labels"][-1:].tolist())


def test_an_epoch_of_several_corpora_holds_all_their_samples_once(corpora: tuple[str, str]) -> None:
    tokenizer = NullTokenizer(VOCABULARY)
    alone = [text_epoch(settings(DataConfig(data_path=(prefix,), split="80,20")), tokenizer) for prefix in corpora]
    config = settings(DataConfig(data_path=corpora, split="80,20"))
    both = text_epoch(config, tokenizer)
    sizes = [sum(len(part) for epoch in alone if (part := epoch[place]) is not None) for place in (0, 1)]
    assert [len(part) for part in both[:2] if part is not None] == sizes and both[2] is None
    datasets = of_epochs(both, config, 2 * sizes[0], batch_samples=6)
    expected = Counter(text(epoch[0], index) for epoch in alone for index in range(len(epoch[0])))
    for number in (0, 1):
        seen = (text(datasets.train, number * sizes[0] + index) for index in range(sizes[0]))
        assert Counter(seen) == expected
    assert datasets.valid is not None and len(datasets.valid) == -(-sizes[1] // 6) * 6
    assert describe(both) == [f"training: {sizes[0]} samples an epoch", f"validation: {sizes[1]} samples an epoch"]


def test_without_evaluation_no_validation_set_is_read_and_without_a_share_there_is_nothing_to_train_on(
    corpora: tuple[str, str],
) -> None:
    tokenizer = NullTokenizer(VOCABULARY)
    data = DataConfig(train_data_path=corpora, valid_data_path=("nowhere",))
    assert text_epoch(settings(data, eval_iters=0), tokenizer)[1:] == (None, None)
    with pytest.raises(DataError, match="nowhere"):
        text_epoch(settings(data), tokenizer)
