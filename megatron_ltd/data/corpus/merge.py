"""Several corpora to one, in order, byte for byte as Megatron's builder appends them (`add_index`)."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.manifest import Manifest, check_manifest
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from megatron_ltd.errors import ConfigError, DataError

_CHUNK_TOKENS = 1 << 22


def corpora_in(folder: str) -> list[str]:
    """Prefixes of the corpora in a folder, in order of name.

    Raises:
        DataError: the folder holds none, or one of the two files is missing.
    """
    names = sorted(name for name in os.listdir(folder) if name.endswith((".idx", ".bin")))
    prefixes = sorted({name[:-len(".idx")] for name in names})
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if prefix + suffix not in names:
                raise DataError(f"{folder}: no file {prefix}{suffix} beside the other file of that corpus. Copy it, or "
                                "take the other away.")
    if not prefixes:
        raise DataError(f"{folder}: no .bin and .idx in this folder.")
    return [os.path.join(folder, prefix) for prefix in prefixes]


def merge_corpora(prefixes: Sequence[str], output_prefix: str) -> IndexedCorpus:
    """Writes the corpora, one after the other, as one; with a manifest where any of them has one.

    Raises:
        ConfigError: the output is among the input.
        DataError: a corpus is damaged, or of another token type or tokenizer than the first.
    """
    for prefix in prefixes:
        if os.path.realpath(prefix) == os.path.realpath(output_prefix):
            raise ConfigError(f"--output = {output_prefix} is one of the corpora to merge. Choose another.")
    corpora = [IndexedCorpus(prefix) for prefix in prefixes]
    manifests = [check_manifest(corpus, None) for corpus in corpora]
    known = {manifest.tokenizer: prefix for prefix, manifest in zip(prefixes, manifests, strict=True)
             if manifest is not None and manifest.tokenizer is not None}
    for corpus in corpora:
        if corpus.dtype != corpora[0].dtype:
            raise DataError(f"{corpus.prefix} holds tokens of type {corpus.dtype.name}, and {prefixes[0]} of type "
                            f"{corpora[0].dtype.name}. Corpora of one tokenizer have one type; write one of them "
                            "again.")
    if len(known) > 1:
        one, other, *_ = known.values()
        raise DataError(f"{other} was written with another tokenizer than {one}: their manifests say so. Write one of "
                        "them again.")
    with IndexedCorpusWriter(output_prefix, dtype=corpora[0].dtype) as writer:
        for corpus in corpora:
            boundaries = corpus.document_indices
            for begin, end in _spans(corpus):
                sequences = boundaries[begin:end + 1]
                tokens = corpus.read_sequences(int(sequences[0]), int(sequences[-1])) \
                    if sequences[-1] > sequences[0] else np.empty(0, dtype=corpus.dtype)
                writer.add_documents(tokens, corpus.sequence_lengths[sequences[0]:sequences[-1]], np.diff(sequences))
        if any(manifest is not None for manifest in manifests):
            _describe(writer, prefixes, manifests)
    return IndexedCorpus(output_prefix)


def _spans(corpus: IndexedCorpus) -> Iterator[tuple[int, int]]:
    """Runs of documents [begin, end) of about `_CHUNK_TOKENS` tokens, or of one longer document."""
    before = np.zeros(len(corpus) + 1, dtype=np.int64)
    np.cumsum(corpus.sequence_lengths, dtype=np.int64, out=before[1:])
    starts = before[corpus.document_indices]
    begin, documents = 0, len(starts) - 1
    while begin < documents:
        end = int(np.searchsorted(starts, starts[begin] + _CHUNK_TOKENS, side="right")) - 1
        end = min(max(end, begin + 1), documents)
        yield begin, end
        begin = end


def _describe(writer: IndexedCorpusWriter, prefixes: Sequence[str], manifests: Sequence[Manifest | None]) -> None:
    """Writes the manifest: sources and settings of all; tokenizer and vocabulary only if all are known; the tokens
    around documents if all that say have the same, as a run that reads the corpora side by side takes them."""
    known = [manifest for manifest in manifests if manifest is not None]
    everyone = len(known) == len(manifests) and all(manifest.tokenizer is not None for manifest in known)
    around = {name: {manifest.settings.get(name) for manifest in known} - {None}
              for name in ("append_eod", "bos_token_id", "eod_token_id")}
    settings = {"tokenizer_type": known[0].settings.get("tokenizer_type") if everyone else None,
                **{name: values.pop() for name, values in around.items() if len(values) == 1},
                "merged": [{"prefix": prefix, "settings": None if manifest is None else manifest.settings}
                           for prefix, manifest in zip(prefixes, manifests, strict=True)]}
    tokenizer, vocab_size = (known[0].tokenizer, known[0].vocab_size) if everyone else (None, None)
    writer.describe(tokenizer, vocab_size, settings, [source for manifest in known for source in manifest.sources])
