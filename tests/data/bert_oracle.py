"""megatron-core's BERT dataset on the CPU, as the reference. Imports fail without megatron-core."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.helpers_cpp import build_mapping
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split, get_blend_from_list

from megatron_ltd.data.bert.masking import MaskingSettings
from megatron_ltd.data.text.wordpiece import MaskedVocabulary


def mapping(documents: np.ndarray, lengths: np.ndarray, samples: int, longest: int, short_seq_prob: float, seed: int,
            least_sentences: int) -> np.ndarray:
    """The mapping, shuffled."""
    return build_mapping(documents, lengths, np.iinfo(np.int32).max - 1, samples, longest, short_seq_prob, seed, False,
                         least_sentences)


def config(vocabulary: MaskedVocabulary, masking: MaskingSettings, seq_length: int, seed: int, cache: Path,
           short_seq_prob: float, binary_head: bool, **source: Any) -> BERTMaskedWordPieceDatasetConfig:
    """A configuration; without `source` the blend in it is for datasets that are built without one."""
    tokens = {i: f"##{i}" if vocabulary.continues_word[i] else str(i) for i in range(vocabulary.size)}
    tokenizer = SimpleNamespace(
        inv_vocab=tokens, cls=vocabulary.cls, sep=vocabulary.sep, mask=vocabulary.mask, pad=vocabulary.pad,
        eod=vocabulary.sep, eos=vocabulary.sep, vocab_size=vocabulary.size, unique_identifiers={"tokenizer": "test"})
    source = source or {"blend": (["unused"], None), "split": "1,0,0"}
    return BERTMaskedWordPieceDatasetConfig(
        random_seed=seed, sequence_length=seq_length, path_to_cache=str(cache / str(random.random())),
        tokenizer=tokenizer, masking_probability=masking.mask_prob, masking_max_ngram=masking.max_ngram,
        masking_do_full_word=masking.whole_word, masking_use_longer_ngrams=masking.longer_ngrams,
        masking_use_geometric_distribution=masking.geometric, masking_do_permutation=False,
        short_sequence_probability=short_seq_prob, classification_head=binary_head, **source)


def dataset(prefix: Path, documents: range, samples: int,
            settings: BERTMaskedWordPieceDatasetConfig) -> BERTMaskedWordPieceDataset:
    """One part of one corpus."""
    return BERTMaskedWordPieceDataset(IndexedDataset(str(prefix)), str(prefix), np.array(documents, dtype=np.int32),
                                      samples, Split.train, settings)


def build(sizes: list[int], settings: BERTMaskedWordPieceDatasetConfig) -> list[Any]:
    """Training, validation and test set."""
    return BlendedMegatronDatasetBuilder(BERTMaskedWordPieceDataset, sizes, lambda: True, settings).build()


def blend(values: tuple[str, ...]) -> Any:
    """A blend in megatron-core's form."""
    return get_blend_from_list(list(values))


class Alone:
    """As if torch.distributed were running with this process alone, which the datasets ask for."""

    def __enter__(self) -> None:
        self._saved = torch.distributed.get_rank
        torch.distributed.get_rank = lambda *_: 0

    def __exit__(self, *error: object) -> None:
        torch.distributed.get_rank = self._saved
