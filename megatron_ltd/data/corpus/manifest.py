"""`{prefix}.manifest.json`: what a corpus consists of and what made it, written beside it by this project's tools.

Corpora of other tools have none and are read as they are. With a manifest, training rejects a corpus that another
tokenizer wrote, or whose index or size differs from what was written (`check_manifest`, which reads no more than
opening does); `verify_manifest` reads both files.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class FileFacts:
    """A file: its size and SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceFacts(FileFacts):
    """A file that a corpus was made from, as it was named."""

    path: str


@dataclass(frozen=True)
class Manifest:
    """All that is recorded about a corpus.

    Attributes:
        tokenizer: digest of what decides the token ids; None: not known (merged from corpora without a manifest).
        settings: how documents became tokens, for people to read.
    """

    bin: FileFacts
    idx: FileFacts
    dtype: str
    documents: int
    sequences: int
    tokens: int
    tokenizer: str | None
    vocab_size: int | None
    settings: dict[str, Any]
    sources: tuple[SourceFacts, ...]

    def to_bytes(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n").encode(
            errors="surrogateescape")


def manifest_path(prefix: str) -> str:
    return f"{prefix}.manifest.json"


def read_manifest(prefix: str) -> Manifest | None:
    """The manifest of a corpus, None without one.

    Raises:
        DataError: the file cannot be read, or is not a manifest.
    """
    path = manifest_path(prefix)
    if not os.path.lexists(path):
        return None
    try:
        found = json.loads(Path(path).read_bytes().decode("utf-8", errors="surrogateescape"))
        if found.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        manifest = Manifest(**{**found, "bin": FileFacts(**found["bin"]), "idx": FileFacts(**found["idx"]),
                               "sources": tuple(SourceFacts(**source) for source in found["sources"])})
        _check_types(manifest)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not the manifest of a corpus: {error!r}. Write the corpus again; or remove this "
                        "file to use the corpus unchecked.") from error
    return manifest


def check_manifest(corpus: IndexedCorpus, tokenizer: str | None) -> Manifest | None:
    """Compares an opened corpus with its manifest, if it has one.

    Args:
        tokenizer: digest of the tokenizer that will read it; None: not compared.

    Raises:
        DataError: another tokenizer wrote it, or it is not what was written.
    """
    manifest = read_manifest(corpus.prefix)
    if manifest is None:
        return None
    _compare(f"{corpus.prefix}.idx", "SHA-256", manifest.idx.sha256, corpus.index_sha256)
    _compare(f"{corpus.prefix}.bin", "bytes", manifest.bin.bytes, corpus.tokens * corpus.dtype.itemsize)
    if tokenizer is not None and manifest.tokenizer is not None and manifest.tokenizer != tokenizer:
        kind = manifest.settings.get("tokenizer_type", "of unknown type")
        raise DataError(
            f"Corpus {corpus.prefix} was written with another tokenizer ({kind}, digest "
            f"{manifest.tokenizer[:12]}) than the one given (digest {tokenizer[:12]}): its token ids would mean other "
            f"text. Give that tokenizer, or write the corpus again with this one ({manifest_path(corpus.prefix)} says "
            "how it was made).")
    return manifest


def verify_manifest(corpus: IndexedCorpus, tokenizer: str | None) -> Manifest | None:
    """As `check_manifest`, and reads all of both files."""
    manifest = check_manifest(corpus, tokenizer)
    if manifest is not None:
        for path, facts in ((f"{corpus.prefix}.bin", manifest.bin), (f"{corpus.prefix}.idx", manifest.idx)):
            _compare(path, "SHA-256", facts.sha256, file_facts(path).sha256)
    return manifest


def file_facts(path: str) -> FileFacts:
    """Size and SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return FileFacts(stream.tell(), digest)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _check_types(manifest: Manifest) -> None:
    """Raises TypeError where a value that is used later has the wrong type."""
    facts = (manifest.bin, manifest.idx, *manifest.sources)
    texts, numbers = [fact.sha256 for fact in facts], [fact.bytes for fact in facts]
    if not (all(isinstance(text, str) for text in (*texts, manifest.tokenizer or ""))
            and all(isinstance(number, int) for number in (*numbers, manifest.vocab_size or 0))
            and isinstance(manifest.settings, dict)):
        raise TypeError("a value has the wrong type")


def _compare(path: str, what: str, written: str | int, found: str | int) -> None:
    if written != found:
        manifest = manifest_path(os.path.splitext(path)[0])
        raise DataError(f"{path} is not the file that was written: {what} {found}, and {manifest} says {written}. Copy "
                        "or write the corpus again; if it was changed on purpose, remove the manifest.")
