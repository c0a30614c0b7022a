"""megatron-core's datasets on the CPU, as the reference for sample order. Imports fail without megatron-core."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split, get_blend_from_list

SPLITS = (Split.train, Split.valid, Split.test)


def gpt_config(seed: int, seq_length: int, cache: Path | None, **settings: Any) -> GPTDatasetConfig:
    """A configuration; the blend in it is for datasets that are built without one."""
    tokenizer = SimpleNamespace(vocab_size=50257, eod=3, eos=3, pad=-1, unique_identifiers={"tokenizer": "test"})
    settings = {"blend": (["unused"], None), "split": "1,0,0", "reset_position_ids": False, "eod_mask_loss": False,
                "reset_attention_mask": False, "create_attention_mask": False, **settings}
    return GPTDatasetConfig(random_seed=seed, sequence_length=seq_length, path_to_cache=str(cache) if cache else None,
                            tokenizer=tokenizer, **settings)


def gpt_dataset(prefix: Path, sequences: range, num_samples: int | None, config: GPTDatasetConfig) -> GPTDataset:
    """One part of one corpus."""
    return GPTDataset(IndexedDataset(str(prefix)), str(prefix), np.array(sequences, dtype=np.int32), num_samples,
                      Split.train, config)


def build(sizes: list[int], config: GPTDatasetConfig) -> list[Any]:
    """Training, validation and test set."""
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def blend(values: tuple[str, ...] | None) -> Any:
    """A blend in megatron-core's form."""
    return get_blend_from_list(list(values)) if values is not None else None
