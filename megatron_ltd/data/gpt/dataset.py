"""GPT samples from a corpus: consecutive stretches of its shuffled documents (order: `index.py`)."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.corpus.index_cache import cached_arrays
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.gpt.fill_in_the_middle import FillInTheMiddle
from megatron_ltd.data.gpt.index import LABEL_TOKENS, GPTIndex, build_gpt_index
from megatron_ltd.data.sample import GPTSampleForm, Sample, check_index
from megatron_ltd.errors import DataError


class GPTDataset:
    """Samples of seq_length + 1 tokens from a part of a corpus.

    Args:
        sequences: the part of the corpus.
        num_samples: the dataset has at least this many; None: one epoch.
        seed: decides the order.
        form: how a stretch of tokens becomes a sample.
        cache_path: --data-cache-path.
        middle: rearranges documents; None leaves them as they are.

    Raises:
        DataError: the part holds fewer tokens than one sample.
    """

    def __init__(self, corpus: IndexedCorpus, sequences: range, num_samples: int | None, seed: int, form: GPTSampleForm,
                 cache_path: str | None = None, middle: FillInTheMiddle | None = None):
        part_tokens = corpus.tokens_of(sequences)
        if part_tokens < form.seq_length + LABEL_TOKENS:
            raise DataError(
                f"Corpus {corpus.prefix}: sequences [{sequences.start}, {sequences.stop}) of {len(corpus)} hold "
                f"{part_tokens} tokens, and one sample takes {form.seq_length + LABEL_TOKENS} (--seq-length + 1). "
                "Give this split more of the corpus, use a larger corpus or a smaller --seq-length.")
        self.corpus, self.form, self.epoch_tokens = corpus, form, part_tokens
        key: dict[str, Any] = {
            "index": "gpt", "corpus": corpus.content_digest, "sequences": [sequences.start, sequences.stop],
            "num_samples": num_samples, "seq_length": form.seq_length, "seed": seed}
        self.index = GPTIndex(*cached_arrays(cache_path, key, lambda: build_gpt_index(
            corpus.sequence_lengths, sequences, num_samples, form.seq_length, seed)))
        key["form"] = dataclasses.asdict(form)
        self.middle, self._seeds = middle, [seed, int(corpus.content_digest[:8], 16)]
        if middle is not None:
            key["fill in the middle"] = middle.settings
        self.digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.index.shuffle_index)

    def text(self, index: int) -> NDArray[np.int64]:
        """The seq_length + 1 tokens of a sample."""
        check_index(index, self)
        row = int(self.index.shuffle_index[index])
        (first, begin), (last, end) = self.index.sample_index[row:row + 2].tolist()
        documents = self.index.document_index[first:last + 1].tolist()
        read = self.corpus.read
        if first == last:
            parts = [read(documents[0], begin, end + LABEL_TOKENS - begin)]
        else:
            parts = [read(documents[0], begin), *map(read, documents[1:-1]),
                     read(documents[-1], 0, end + LABEL_TOKENS)]
        text = np.concatenate(parts, dtype=np.int64)
        self.corpus.check_ids(text, self.form.vocab_size)
        return text

    def sample(self, index: int) -> Sample:
        text = self.text(index)
        if self.middle is None:
            return self.form.arrays(text)
        text = self.middle.rearranged(text, np.random.RandomState([*self._seeds, index]))
        sample = self.form.arrays(text)
        sample["loss_mask"][sample["labels"] == self.middle.pad] = 0.0
        return sample
