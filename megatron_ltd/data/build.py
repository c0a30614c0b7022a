"""Training, validation and test sets of a run: from --data-path and --split, a path for each, or --mock-data."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.bert.dataset import LEAST_TOKENS as BERT_LEAST_TOKENS
from megatron_ltd.data.bert.dataset import SPECIAL_TOKENS, BertDataset, BertSampleForm
from megatron_ltd.data.bert.masking import MaskingSettings
from megatron_ltd.data.blend import (
    SURPLUS,
    BlendedDataset,
    BlendIndex,
    BlendSource,
    corpus_part,
    dataset_sizes,
    normalize,
    parse_blend,
)
from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.manifest import check_manifest, verify_manifest
from megatron_ltd.data.corpus.seals import remove_seals
from megatron_ltd.data.gpt.dataset import GPTDataset
from megatron_ltd.data.gpt.fill_in_the_middle import fill_in_the_middle
from megatron_ltd.data.gpt.index import SPLITS, split_bounds, split_range
from megatron_ltd.data.gpt.parts import LongSamples, PartedDataset
from megatron_ltd.data.held_out import together
from megatron_ltd.data.mock_dataset import MockBertDataset, MockDataset
from megatron_ltd.data.sample import Dataset, GPTSampleForm
from megatron_ltd.data.text.tokenizer import MaskedTokenizer, Tokenizer
from megatron_ltd.data.text.wordpiece import MaskedVocabulary
from megatron_ltd.data.validation_sets import validation_sets
from megatron_ltd.errors import ConfigError, DataError

_VOCABULARY_SPANS = 64
_THREADS = 8


class Datasets(NamedTuple):
    """The sets of a run; None where none was asked for or no data is set aside. `valid` may be `NamedSets`."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None


def build_datasets(config: RunConfig, tokenizer: Tokenizer, train_samples: int, valid_samples: int | None,
                   test_samples: int, predictions_per_sample: int | None = None,
                   long_samples: tuple[int, int] | None = None) -> Datasets:
    """Builds what the settings ask for.

    Args:
        train_samples, valid_samples, test_samples: samples that the run will read of each, and of each validation set
            with a name; 0: not needed; None: all.
        predictions_per_sample: places for predicted tokens in a BERT sample; GPT takes none.
        long_samples: how many of the first training samples are longer than the others, and how many times; None: all
            are of one length.

    Raises:
        ConfigError: no source of data, two that contradict each other, or a tokenizer that BERT cannot use.
        DataError: a corpus is missing, damaged, of another vocabulary, or too small.
    """
    if train_samples < 1:
        raise ConfigError(f"A run of {train_samples} training samples reads nothing; set --train-iters, "
                          "--train-samples or --train-tokens.")
    form = _form(config, tokenizer, predictions_per_sample)
    forms: list[Form] = [form, form, form]
    samples = [train_samples, valid_samples, test_samples]
    first = None if long_samples is None else LongSamples(*long_samples)
    if first is not None:
        assert isinstance(form, GPTSampleForm)
        forms[0], samples[0] = replace(form, seq_length=first.parts * form.seq_length), first.needed(train_samples)
    datasets: list[Dataset | None]
    if config.data.mock_data:
        datasets = [_mock_dataset(split, count, config.training.seed, forms[split]) if count else None
                    for split, count in enumerate(samples)]
    else:
        corpora: dict[str, IndexedCorpus] = {}
        datasets = [together({name: _Builder(config, of_split, tokenizer, corpora).blend(split, *source, count)
                              for name, source in (sources if count != 0 else {}).items()})
                    for split, of_split, sources, count in zip(SPLITS, forms, sources(config), samples, strict=True)]
    train, valid, test = datasets
    if train is None:
        raise ConfigError("No training data: give --train-data-path, or --data-path and a --split whose first share is "
                          "above 0.")
    return Datasets(train if first is None else PartedDataset(train, first), valid, test)


def one_epoch_datasets(config: RunConfig, tokenizer: Tokenizer) -> list[Dataset | None]:
    """Training, validation and test sets of GPT samples that hold the whole corpus once; None for no data.

    Raises:
        ConfigError, DataError: as `build_datasets`.
    """
    builder = _Builder(config, _form(config, tokenizer, None), tokenizer, {})
    skipped = set() if config.logging.evaluates else {"valid", "test"}
    return [together({name: builder.epoch(split, source.prefixes, bounds) for name, (source, bounds) in sources.items()
                      if split not in skipped})
            for split, sources in zip(SPLITS, sources(config), strict=True)]


def datasets_digest(tokenizer: Tokenizer, datasets: Datasets) -> str:
    """SHA-256 that is equal on all processes if and only if they would read the same samples."""
    parts = [tokenizer.digest, *(dataset.digest if dataset is not None else "none" for dataset in datasets)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


Bounds = tuple[float, float]
Form = GPTSampleForm | BertSampleForm


def _form(config: RunConfig, tokenizer: Tokenizer, predictions: int | None) -> Form:
    data, seq_length = config.data, config.model.seq_length
    if config.model.family == "gpt":
        splits = data.eod_mask_loss or data.reset_position_ids or data.reset_attention_mask
        eod = tokenizer.eod if splits else -1  # a tokenizer may have none
        return GPTSampleForm(seq_length, tokenizer.vocab_size, eod, data.eod_mask_loss, data.reset_position_ids,
                             data.reset_attention_mask)
    if seq_length < BERT_LEAST_TOKENS:
        raise ConfigError(f"--seq-length = {seq_length}: a BERT sample takes at least {BERT_LEAST_TOKENS} tokens, "
                          "three of them special; choose such a length.")
    if data.mask_prob * (seq_length - SPECIAL_TOKENS) < 1:
        raise ConfigError(f"--mask-prob = {data.mask_prob}: less than one of the {seq_length - SPECIAL_TOKENS} tokens "
                          f"of a sample of --seq-length = {seq_length}, so nothing would be predicted; raise one.")
    if predictions is None:
        raise ValueError("BERT samples need predictions_per_sample")
    masking = MaskingSettings(data.mask_prob, data.mask_max_ngram, data.mask_whole_word, data.mask_longer_ngrams,
                              data.mask_geometric)
    return BertSampleForm(seq_length, predictions, _masked_vocabulary(config, tokenizer), masking,
                          config.model.has_binary_head, data.short_seq_prob)


def _masked_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> MaskedVocabulary:
    size = tokenizer.vocab_size
    if isinstance(tokenizer, MaskedTokenizer) and tokenizer.pad is not None:
        return MaskedVocabulary(size, tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask,
                                tokenizer.continues_word)
    if not config.data.mock_data:
        raise ConfigError(
            f"--tokenizer-type = {config.data.tokenizer_type}: it has no [CLS], [SEP], [MASK] and [PAD], which BERT "
            "needs. Use BertWordPieceLowerCase or BertWordPieceCase with --vocab-file, or HuggingFaceTokenizer with a "
            "WordPiece that has them, and a corpus written with it.")
    if size < 5:
        raise ConfigError(f"--vocab-size = {config.model.vocab_size}: random BERT samples take at least 5 token ids.")
    return MaskedVocabulary(size, pad=0, cls=1, sep=2, mask=3, continues_word=np.zeros(size, dtype=np.bool_))


def _mock_dataset(split: int, samples: int, seed: int, form: Form) -> Dataset:
    if isinstance(form, BertSampleForm):
        return MockBertDataset(split, samples, seed, form)
    return MockDataset(split, samples, seed, form)


def sources(config: RunConfig) -> list[dict[str, tuple[BlendSource, Bounds]]]:
    """Corpora and the share of each of them, for training, validation and test, by the name of the set: "" without."""
    data = config.data
    flags = {f"--{name}-data-path": getattr(data, f"{name}_data_path") for name in SPLITS}
    given = [flag for flag, values in flags.items() if values is not None]
    if data.data_path is not None and given:
        raise ConfigError(f"--data-path and {given[0]} are both given. Use --data-path with --split, or one path for "
                          "each of training, validation and test.")
    if data.data_path is not None:
        source = parse_blend("--data-path", data.data_path)
        return [{"": (source, bounds)} if bounds is not None else {} for bounds in split_bounds(data.split)]
    if not given:
        raise ConfigError("No data: give --data-path, --train-data-path, or --mock-data.")
    sources = []
    for flag, values in flags.items():
        named = validation_sets(data) if flag == "--valid-data-path" else {}
        sets = named or ({"": values} if values is not None else {})
        sources.append({name: (_without_one_weight(parse_blend(flag, prefixes)), (0.0, 1.0))
                        for name, prefixes in sets.items()})
    return sources


def _without_one_weight(source: BlendSource) -> BlendSource:
    """A weight means nothing for one corpus."""
    return BlendSource(source.prefixes, None) if len(source.prefixes) == 1 else source


class _Builder:
    """Builds datasets and opens each corpus once.

    Args:
        corpora: those that are open, by prefix; extended.
    """

    def __init__(self, config: RunConfig, form: Form, tokenizer: Tokenizer, corpora: dict[str, IndexedCorpus]):
        self.config, self.form, self.tokenizer, self.corpora = config, form, tokenizer, corpora
        self.middle = fill_in_the_middle(config.data, tokenizer)
        if not corpora and config.data.verify_corpus and config.data.data_cache_path is not None:
            remove_seals(config.data.data_cache_path)

    def blend(self, split: str, source: BlendSource, bounds: Bounds, num_samples: int | None) -> Dataset:
        """One dataset from all corpora of a split; one epoch of them if the number of samples is None."""
        prefixes, cache = source.prefixes, self.config.data.data_cache_path
        if source.weights is None and len(prefixes) == 1:
            return self.part(split, prefixes[0], bounds, num_samples)
        if source.weights is None:
            return self.epoch(split, prefixes, bounds, num_samples)
        assert num_samples is not None, "the settings were checked: with weights there is no epoch"
        self.open(prefixes)
        weights = normalize(source.weights)
        index = BlendIndex(weights, sum(dataset_sizes(num_samples, weights)), cache)
        datasets = []
        sizes = dataset_sizes(num_samples, weights, SURPLUS)
        for prefix, size, drawn in zip(prefixes, sizes, index.drawn, strict=True):
            dataset = self.part(split, prefix, bounds, size)
            if len(dataset) < drawn:  # many small weights: the blend draws more than the share and its surplus
                dataset = self.part(split, prefix, bounds, drawn)
            datasets.append(dataset)
        return BlendedDataset(datasets, index)

    def epoch(self, split: str, prefixes: Sequence[str], bounds: Bounds, num_samples: int | None = None) -> Dataset:
        """One epoch of the corpora of a split, or the first samples of it."""
        self.open(prefixes)
        datasets = [self.part(split, prefix, bounds, None) for prefix in prefixes]
        if len(datasets) == 1 and num_samples is None:
            return datasets[0]
        lengths = [len(dataset) for dataset in datasets]
        if num_samples is not None and sum(lengths) < num_samples:
            raise DataError(
                f"{split}: the run reads {num_samples} samples, and one epoch of {', '.join(prefixes)} holds "
                f"{sum(lengths)}. Give weights (WEIGHT PREFIX pairs), with which corpora are repeated, or ask for "
                "fewer samples.")
        index = BlendIndex(lengths, sum(lengths) if num_samples is None else num_samples,
                           self.config.data.data_cache_path)
        return BlendedDataset(datasets, index)

    def part(self, split: str, prefix: str, bounds: Bounds, num_samples: int | None) -> Dataset:
        """One split of one corpus: of its sequences for GPT, of its documents for BERT."""
        self.open([prefix])
        prefix, of_corpus = corpus_part(prefix)
        if of_corpus is not None and self.config.data.data_path is not None:
            raise ConfigError(f"--data-path: {prefix}@{of_corpus[0]}:{of_corpus[1]} is a part, and --split divides it. "
                              "Give parts in --train-data-path, --valid-data-path and --test-data-path.")
        bounds = of_corpus or bounds
        corpus, form, data = self.corpora[prefix], self.form, self.config.data
        unit, count = ("sequences", len(corpus)) if isinstance(form, GPTSampleForm) else \
            ("documents", corpus.documents)
        part = split_range(bounds, count)
        if not part:
            share = f"{unit} [{part.start}, {part.stop}) of the {count} in {prefix}"
            if data.data_path is None:
                named = f"{prefix}@{bounds[0]}:{bounds[1]}" if of_corpus is not None else prefix
                raise DataError(f"The {split} set is empty: --{split}-data-path = {named} gives it {share}. Give it a "
                                "larger part, or a corpus of more documents.")
            raise DataError(
                f"The {split} set is empty: --split = {data.split} gives it {share}. Give it a larger share, a corpus "
                "of more documents, or --train-data-path and --valid-data-path; --eval-iters 0 runs without "
                "validation.")
        seed, cache = self.config.training.seed, data.data_cache_path
        if isinstance(form, BertSampleForm):
            return BertDataset(corpus, part, num_samples, seed, form, cache)
        return GPTDataset(corpus, part, num_samples, seed, form, cache, self.middle)

    def open(self, prefixes: Sequence[str]) -> None:
        """Opens corpora, several at a time, for it is mostly disks that this waits for. The first error is raised."""
        named = dict.fromkeys(corpus_part(prefix)[0] for prefix in prefixes)
        new = [prefix for prefix in named if prefix not in self.corpora]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="corpora") as pool:
            try:
                self.corpora.update(zip(new, pool.map(self._opened, new), strict=True))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _opened(self, prefix: str) -> IndexedCorpus:
        corpus = IndexedCorpus(prefix, self.config.data.data_cache_path)
        compare = verify_manifest if self.config.data.verify_corpus else check_manifest
        compare(corpus, self.tokenizer.digest)
        corpus.check_ids(np.array(corpus.token_id_range(spans=_VOCABULARY_SPANS)), self.form.vocab_size)
        return corpus
