"""Small corpora for the tests of the data layer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.manifest import Manifest, file_facts, manifest_path
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter

Documents = Sequence[Sequence[int]]


def random_documents(seed: int, count: int, longest: int, vocab_size: int, eod: int | None = None) -> list[list[int]]:
    """Documents of 0 to `longest` tokens, ending with `eod` where one is given."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, vocab_size, size).tolist() for size in random.integers(0, longest + 1, count)]
    return documents if eod is None else [document + [eod] for document in documents]


def write_corpus(prefix: Path, documents: Documents, vocab_size: int | None = None) -> IndexedCorpus:
    """Each document as one sequence, also the empty ones."""
    with IndexedCorpusWriter(str(prefix), vocab_size) as writer:
        for document in documents:
            writer.add_document(document, [len(document)])
    return IndexedCorpus(str(prefix))


def write_sentences(prefix: Path, documents: Sequence[Documents], vocab_size: int | None = None) -> IndexedCorpus:
    """Each document as a list of sentences."""
    with IndexedCorpusWriter(str(prefix), vocab_size) as writer:
        for sentences in documents:
            writer.add_document([token for sentence in sentences for token in sentence],
                                [len(sentence) for sentence in sentences])
    return IndexedCorpus(str(prefix))


def described(corpus: IndexedCorpus, tokenizer: str | None, vocab_size: int | None) -> Manifest:
    """Writes a manifest beside a corpus."""
    manifest = Manifest(file_facts(f"{corpus.prefix}.bin"), file_facts(f"{corpus.prefix}.idx"), corpus.dtype.name,
                        len(corpus.document_indices) - 1, len(corpus), corpus.tokens, tokenizer, vocab_size,
                        {"tokenizer_type": "Test"}, ())
    Path(manifest_path(corpus.prefix)).write_bytes(manifest.to_bytes())
    return manifest


def random_sentences(seed: int, count: int, most: int, longest: int, vocab_size: int) -> list[list[list[int]]]:
    """Documents of 0 to `most` sentences of 1 to `longest` tokens, of ids from 5 on."""
    random = np.random.default_rng(seed)
    return [[random.integers(5, vocab_size, size).tolist() for size in random.integers(1, longest + 1, sentences)]
            for sentences in random.integers(0, most + 1, count)]
