"""BERT samples from a corpus of sentences: equal to megatron-core's for the same (seed, index, settings)."""

import hashlib
import json
from typing import Any

import numpy as np

from megatron_ltd.data.bert.mapping import build_mapping
from megatron_ltd.data.bert.sample import BertSampleForm
from megatron_ltd.data.corpus.index_cache import cached_arrays
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.sample import Sample, check_index
from megatron_ltd.errors import DataError


class BertDataset:
    """Samples of consecutive sentences from a part of a corpus.

    A sample is drawn from RandomState(seed + index) alone. It differs from megatron-core's in one thing: a [PAD] that
    replaces a token at random, or stands in the text, is no padding.

    Args:
        documents: the part of the corpus.
        num_samples: at least so many samples; None: one epoch.
        seed: decides the order, the segments and the masks.
        form: how sentences become a sample.
        cache_path: --data-cache-path.

    Raises:
        DataError: a corpus without sentences, or a part that yields no sample.
    """

    def __init__(self, corpus: IndexedCorpus, documents: range, num_samples: int | None, seed: int,
                 form: BertSampleForm, cache_path: str | None = None):
        if len(corpus) and np.diff(corpus.document_indices).max(initial=0) < 2:
            raise DataError(
                f"Corpus {corpus.prefix} holds whole documents ({len(corpus)} sequences in "
                f"{corpus.documents} documents), and BERT reads sentences. Write it with "
                "tools/preprocess_data.py --split-sentences, which names it ..._sentence.")
        self.corpus, self.form, self._seed = corpus, form, seed
        key: dict[str, Any] = {
            "index": "bert", "corpus": corpus.content_digest, "documents": [documents.start, documents.stop],
            "num_samples": num_samples, "longest": form.longest, "short_seq_prob": form.short_seq_prob, "seed": seed,
            "least_sentences": form.least_sentences}
        bounds = corpus.document_indices[documents.start:documents.stop + 1]
        try:
            self.mapping, = cached_arrays(cache_path, key, lambda: (build_mapping(
                bounds, corpus.sequence_lengths, num_samples, form.longest, form.short_seq_prob, seed,
                form.least_sentences),))
        except DataError as error:
            raise DataError(f"Corpus {corpus.prefix}, documents [{documents.start}, {documents.stop}) of "
                            f"{corpus.documents}: {error}") from error
        key["form"] = form.key()
        self.digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.mapping)

    def sample(self, index: int) -> Sample:
        check_index(index, self)
        first, end, target = self.mapping[index].tolist()
        text = self.corpus.read_sequences(first, end).astype(np.int64)
        self.corpus.check_ids(text, self.form.vocab_size)
        random = np.random.RandomState((self._seed + index) % 2**32)
        return self.form.arrays(text, self.corpus.sequence_lengths[first:end], target, random)
