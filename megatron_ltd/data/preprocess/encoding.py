"""A block of documents to token ids."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.preprocess.documents import BadLine, sorted_documents
from megatron_ltd.data.preprocess.text_input import Block
from megatron_ltd.data.text.beginning import chosen_bos
from megatron_ltd.data.text.fast_bpe import Engine, FastBpe, with_engine
from megatron_ltd.data.text.recurring_words import FlatIds, RecurringWords
from megatron_ltd.data.text.sentences import SentencePlan, SentenceSplitter
from megatron_ltd.data.text.tokenizer import Tokenizer, build_tokenizer
from megatron_ltd.errors import DataError

_LONG_TOKENS = 100


@dataclass(frozen=True)
class EncodingPlan:
    """How documents become tokens.

    Attributes:
        json_keys: each key of an object becomes a corpus of its own.
        append_eod: end every document that has a token with the end-of-document token. `tokenizer.bos_token` says with
            which one it begins.
        sentences: every sentence becomes a sequence of its own; None: every document does.
        on_bad_line: fail, or leave out lines that hold no document and, with quarantine, keep them beside the corpora.
        engine: the library that tokenizes; the ids do not depend on it.
    """

    tokenizer: DataConfig
    vocab_size: int | None
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    sentences: SentencePlan | None = None
    on_bad_line: Literal["fail", "skip", "quarantine"] = "fail"
    engine: Engine = "auto"

    @property
    def level(self) -> str:
        """What a sequence is: the last part of a corpus's name."""
        return "document" if self.sentences is None else "sentence"

    def prefixes(self, output_prefix: str) -> list[str]:
        """The corpora that are written."""
        return [f"{output_prefix}_{key}_{self.level}" for key in self.json_keys]

    def choose_tokenizer(self) -> tuple[Tokenizer, str | None]:
        """The tokenizer of the library that `engine` names, and a remark on what `auto` has chosen."""
        return with_engine(build_tokenizer(self.tokenizer, self.vocab_size), self.engine)


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of one key: all tokens back to back, the tokens of each sequence, the sequences of each document."""

    tokens: NDArray[np.integer[Any]]
    lengths: NDArray[np.int64]
    sequences: NDArray[np.int64]


@dataclass(frozen=True)
class EncodedBlock:
    """A block of input: its size decompressed, its documents for each key, and its lines that hold none."""

    size_bytes: int
    documents: list[EncodedDocuments]
    bad: list[BadLine]


def encode_block(plan: EncodingPlan, block: Block, tokenizer: Tokenizer) -> EncodedBlock:
    """Tokenizes the documents of a block with the tokenizer of the plan.

    Raises:
        DataError: the block has a bad line, and these are not to be left out.
    """
    fail = plan.on_bad_line == "fail"
    texts, bad = sorted_documents(block, plan.json_keys, most_bad=1 if fail else None)
    if fail and bad:
        raise DataError(f"{bad[0]} Correct or remove this line (file:line:byte) and run again, or leave such lines out "
                        "with --on-bad-line skip or quarantine; nothing was written.")
    return EncodedBlock(block.size_bytes, [_encode(plan, tokenizer, column) for column in texts], bad)


def encode_in_worker(plan: EncodingPlan, block: Block | None) -> EncodedBlock:
    """Tokenizes a block in a process that builds its tokenizer once; without a block, does no more than that."""
    if block is None:
        _tokenizer(plan)
        return EncodedBlock(0, [], [])
    return encode_block(plan, block, _tokenizer(plan))


def _encode(plan: EncodingPlan, tokenizer: Tokenizer, texts: list[str]) -> EncodedDocuments:
    if plan.sentences is None:
        parts, counts = texts, np.ones(len(texts), dtype=np.int64)
    else:
        splitter = _splitter(plan.sentences)
        cut = [plan.sentences.cut(text, splitter) for text in texts]
        parts = list(itertools.chain.from_iterable(cut))
        counts = np.fromiter(map(len, cut), dtype=np.int64, count=len(cut))
    tokens, lengths = tokenizer.encode_flat(parts) if isinstance(tokenizer, FastBpe | RecurringWords) else \
        _flat(tokenizer.encode_batch(parts))
    documents = np.repeat(np.arange(len(texts)), counts)[lengths > 0]
    sequences = np.bincount(documents, minlength=len(texts)).astype(np.int64)
    lengths = lengths[lengths > 0]
    last = (np.cumsum(sequences) - 1)[sequences > 0]  # as Megatron does: a document without tokens stays without tokens
    if (bos := chosen_bos(tokenizer, plan.tokenizer.bos_token)[0]) is not None:
        first = (np.cumsum(sequences) - sequences)[sequences > 0]
        tokens = _with_token(tokens, (np.cumsum(lengths) - lengths)[first], bos)
        lengths[first] += 1
    if plan.append_eod:
        tokens = _with_token(tokens, np.cumsum(lengths)[last], tokenizer.eod)
        lengths[last] += 1
    return EncodedDocuments(tokens, lengths, sequences)


def _with_token(tokens: NDArray[np.integer[Any]], places: NDArray[np.int64], token: int) -> NDArray[np.integer[Any]]:
    """The tokens, with one more before each of the places."""
    if len(tokens) < _LONG_TOKENS * len(places):
        return np.insert(tokens, places, token)
    found = np.empty(len(tokens) + len(places), dtype=tokens.dtype)  # several times faster for long documents
    begin = 0
    for number, place in enumerate(places.tolist()):
        found[begin + number:place + number] = tokens[begin:place]
        found[place + number] = token
        begin = place
    found[begin + len(places):] = tokens[begin:]
    return found


def _flat(ids: Sequence[Sequence[int]]) -> FlatIds:
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum())), lengths


@functools.lru_cache(maxsize=1)
def _tokenizer(plan: EncodingPlan) -> Tokenizer:
    return plan.choose_tokenizer()[0]


@functools.lru_cache(maxsize=1)
def _splitter(plan: SentencePlan) -> SentenceSplitter:
    return plan.build()
