"""The sets of a finetuning run: a corpus, or prompts and responses, read for whole epochs."""

from collections.abc import Sequence

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.build import Datasets, one_epoch_datasets
from megatron_ltd.data.finetuning.conversations import chat_of
from megatron_ltd.data.finetuning.epochs import EpochDataset
from megatron_ltd.data.finetuning.packing import PackedDataset
from megatron_ltd.data.finetuning.responses import ResponseForm, read_responses
from megatron_ltd.data.held_out import in_whole_batches, named_sets, together
from megatron_ltd.data.sample import Dataset
from megatron_ltd.data.text.beginning import chosen_bos
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.data.validation_sets import validation_sets
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
        train = _packed("--train-jsonl", data.train_jsonl, config, tokenizer)
        test = _packed("--test-jsonl", data.test_jsonl, config, tokenizer) if data.test_jsonl else None
        sets = validation_sets(data) or ({"": data.valid_jsonl} if data.valid_jsonl else {})
        valid = together({name: _packed("--valid-jsonl", patterns, config, tokenizer)
                          for name, patterns in sets.items()})
    if train is None:
        raise DataError(f"--split = {data.split}: there is no training set; give it a share of the corpus")
    return train, valid, test


def of_epochs(epoch: Epoch, config: RunConfig, train_samples: int, batch_samples: int) -> Datasets:
    """The sets as a run reads them: training samples of all its epochs, and held-out sets in whole global batches."""
    train, valid, test = epoch
    return Datasets(EpochDataset(train, train_samples, config.training.seed), in_whole_batches(valid, batch_samples),
                    in_whole_batches(test, batch_samples))


def describe(epoch: Epoch) -> list[str]:
    """What was read, for the log."""
    lines = []
    kinds = zip(("training", "validation", "test"), epoch, strict=True)
    sets = [(f"{kind} {name}".rstrip(), part) for kind, dataset in kinds for name, part in named_sets(dataset).items()]
    for name, dataset in sets:
        if isinstance(dataset, PackedDataset):
            skipped, talks = dataset.responses.skipped, dataset.responses.conversations
            lines.append(f"{name}: {len(dataset.responses)} {'examples' if talks else 'responses'} in {len(dataset)} "
                         f"samples, {100 * dataset.fullness:.1f}% full"
                         + (f"; {talks} are conversations, written by {dataset.responses.chat}" if talks else "")
                         + (f"; {skipped} were too long and are left out" if skipped else ""))
        else:
            lines.append(f"{name}: {len(dataset)} samples an epoch")
    return lines


def _packed(flag: str, patterns: Sequence[str], config: RunConfig, tokenizer: Tokenizer) -> Dataset:
    data, length = config.data, config.model.seq_length
    bos, _ = chosen_bos(tokenizer, data.bos_token)
    form = ResponseForm(data.prompt_key, data.response_key, length, data.overlong_samples == "skip", data.messages_key,
                        chat_of(data, tokenizer), bos)
    return PackedDataset(read_responses(flag, patterns, tokenizer, form), length, tokenizer.eod)
