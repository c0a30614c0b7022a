"""The sets of a finetuning run: a corpus, or prompts and responses, read for whole epochs."""

from collections.abc import Sequence

from megatron_ltd.config import RunConfig
from megatron_ltd.data.build import Datasets, one_epoch_datasets
from megatron_ltd.data.finetuning.epochs import EpochDataset, FilledDataset
from megatron_ltd.data.finetuning.packing import PackedDataset
from megatron_ltd.data.finetuning.responses import ResponseForm, read_responses
from megatron_ltd.data.sample import Dataset
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import DataError

Epoch = tuple[Dataset, Dataset | None, Dataset | None]
"""Training, validation and test set, each once."""


def text_epoch(config: RunConfig, tokenizer: Tokenizer | None) -> Epoch:
    """One epoch of the corpus, or of prompts and responses.

    Raises:
        ConfigError, DataError: the data are missing, damaged, or do not fit the model.
    """
    assert tokenizer is not None
    data = config.data
    if data.train_jsonl is None:
        train, valid, test = one_epoch_datasets(config, tokenizer)
    else:
        train, valid, test = (_packed(f"--{name}-jsonl", patterns, config, tokenizer) for name, patterns in
                              (("train", data.train_jsonl), ("valid", data.valid_jsonl), ("test", data.test_jsonl)))
    if train is None:
        raise DataError(f"--split = {data.split}: there is no training set; give it a share of the corpus")
    return train, valid, test


def of_epochs(epoch: Epoch, config: RunConfig, train_samples: int, batch_samples: int) -> Datasets:
    """The sets as a run reads them: training samples of all its epochs, and held-out sets in whole global batches."""
    train, valid, test = epoch

    def filled(dataset: Dataset | None) -> Dataset | None:
        if dataset is None:
            return None
        return FilledDataset(dataset, -(-len(dataset) // batch_samples) * batch_samples)

    return Datasets(EpochDataset(train, train_samples, config.training.seed), filled(valid), filled(test))


def describe(epoch: Epoch) -> list[str]:
    """What was read, for the log."""
    lines = []
    for name, dataset in zip(("training", "validation", "test"), epoch, strict=True):
        if isinstance(dataset, PackedDataset):
            skipped = dataset.responses.skipped
            lines.append(f"{name}: {len(dataset.responses)} responses in {len(dataset)} samples, "
                         f"{100 * dataset.fullness:.1f}% full"
                         + (f"; {skipped} were too long and are left out" if skipped else ""))
        elif dataset is not None:
            lines.append(f"{name}: {len(dataset)} samples an epoch")
    return lines


def _packed(flag: str, patterns: Sequence[str] | None, config: RunConfig, tokenizer: Tokenizer) -> Dataset | None:
    if patterns is None:
        return None
    data, length = config.data, config.model.seq_length
    form = ResponseForm(data.prompt_key, data.response_key, length, data.overlong_samples == "skip")
    return PackedDataset(read_responses(flag, patterns, tokenizer, form), length, tokenizer.eod)
