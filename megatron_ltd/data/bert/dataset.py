"""BERT samples from a corpus of sentences: equal to megatron-core's for the same (seed, index, settings).

A sample is consecutive sentences as two segments, in order or swapped, masked and padded.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.bert.mapping import build_mapping
from megatron_ltd.data.bert.masking import Masker, MaskingSettings
from megatron_ltd.data.corpus.index_cache import cached_arrays
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.sample import Sample, check_index
from megatron_ltd.data.text.wordpiece import MaskedVocabulary
from megatron_ltd.errors import DataError

SPECIAL_TOKENS = 3  # [CLS] and, after each segment, [SEP]
LEAST_TOKENS = SPECIAL_TOKENS + 2


@dataclass(frozen=True, eq=False)
class BertSampleForm:
    """How a BERT sample is made of sentences.

    Attributes:
        seq_length: tokens of a sample, special ones and padding included.
        predictions: places for predicted tokens in a sample, at least mask_prob x (seq_length - 3).
        binary_head: two segments, whose order the model predicts; otherwise one segment.
        short_seq_prob: share of samples that are shorter on purpose.
    """

    seq_length: int
    predictions: int
    vocabulary: MaskedVocabulary
    masking: MaskingSettings = MaskingSettings()
    binary_head: bool = True
    short_seq_prob: float = 0.1

    def __post_init__(self) -> None:
        if self.seq_length < LEAST_TOKENS:
            raise ValueError(f"seq_length = {self.seq_length} leaves no room for text")
        if self.predictions < max(1, int(self.masking.mask_prob * self.longest)):
            raise ValueError(f"predictions = {self.predictions} are too few for mask_prob = {self.masking.mask_prob}")

    @cached_property
    def _masker(self) -> Masker:
        return Masker(self.masking, self.vocabulary)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def longest(self) -> int:
        """Tokens of a sample without special ones."""
        return self.seq_length - SPECIAL_TOKENS

    @property
    def least_sentences(self) -> int:
        return 2 if self.binary_head else 1

    def key(self) -> dict[str, Any]:
        """All that decides samples, but for the vocabulary's tokens."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                  if field.name not in ("vocabulary", "masking")}
        ids = {name: getattr(self.vocabulary, name) for name in ("size", "pad", "cls", "sep", "mask")}
        return {**values, **dataclasses.asdict(self.masking), "ids": ids}

    def segments(self, text: NDArray[np.int64], lengths: NDArray[np.int32], target_tokens: int,
                 random: np.random.RandomState) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        """Both segments, together at most as long as the target, and whether they are swapped.

        Args:
            text: the tokens of all sentences.
            lengths: tokens of each sentence.
        """
        if not self.binary_head:
            cut, swapped = len(text), False
        else:
            pivot = random.randint(low=1, high=len(lengths)) if len(lengths) >= 3 else 1
            cut, swapped = int(lengths[:pivot].sum()), bool(random.random_sample() < 0.5)
        first, second = text[:cut], text[cut:]
        if swapped:
            first, second = second, first
        spans = [[0, len(first)], [0, len(second)]]
        surplus = max(0, len(text) - target_tokens)
        for draw in random.random_sample(surplus).tolist():
            longer = spans[0] if spans[0][1] - spans[0][0] > spans[1][1] - spans[1][0] else spans[1]
            if draw < 0.5:
                longer[0] += 1
            else:
                longer[1] -= 1
        return first[slice(*spans[0])], second[slice(*spans[1])], swapped

    def arrays(self, text: NDArray[np.int64], lengths: NDArray[np.int32], target_tokens: int,
               random: np.random.RandomState) -> Sample:
        """The sample of some sentences.

        Shapes:
            s = seq_length, p = predictions -> tokens [s] int64, masked; padding_mask [s] bool, True for real tokens;
            predicted_positions [p] int64, ascending, then 0; labels [p] int64, the tokens that stood there;
            loss_mask [p] float32, 0 where there is no prediction; with the binary head token_types [s] int64, 1 in
            the second segment, and sentence_order [] int64, 1 if the segments are swapped.
        """
        first, second, swapped = self.segments(text, lengths, target_tokens, random)
        cls, sep = [self.vocabulary.cls], [self.vocabulary.sep]
        parts = (cls, first, sep, second, sep) if len(second) else (cls, first, sep)
        original = np.concatenate(parts, dtype=np.int64)
        masked, positions = self._masker.mask(original, target_tokens, random)
        length, count = len(original), len(positions)
        tokens = np.full(self.seq_length, self.vocabulary.pad, dtype=np.int64)
        tokens[:length] = masked
        predicted_positions, labels = np.zeros((2, self.predictions), dtype=np.int64)
        predicted_positions[:count], labels[:count] = positions, original[positions]
        sample: Sample = {
            "tokens": tokens, "padding_mask": np.arange(self.seq_length) < length,
            "predicted_positions": predicted_positions, "labels": labels,
            "loss_mask": (np.arange(self.predictions) < count).astype(np.float32)}
        if self.binary_head:
            types = np.zeros(self.seq_length, dtype=np.int64)
            types[len(first) + 2:length] = 1
            sample["token_types"] = types
            sample["sentence_order"] = np.array(swapped, dtype=np.int64)
        return sample


class BertDataset:
    """Samples of consecutive sentences from a part of a corpus.

    A sample is drawn from RandomState(seed + index) alone. It differs from megatron-core's in one thing: a [PAD] that
    replaces a token at random, or stands in the text, is no padding.

    Args:
        documents: the part of the corpus.
        num_samples: the dataset has at least this many; None: one epoch.
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
