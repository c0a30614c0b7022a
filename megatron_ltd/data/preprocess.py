"""Text files to corpora: read in blocks, tokenize them in worker processes, write in the order of the input.

The order and the bytes of the output do not depend on the number of workers. A block that holds something wrong stops
everything with the place of the first bad line, and nothing is left under the names of the output.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.config import DataConfig
from megatron_ltd.data.documents import documents
from megatron_ltd.data.indexed_writer import IndexedCorpusWriter
from megatron_ltd.data.text_input import Block, TextInput
from megatron_ltd.data.tokenizer import Tokenizer, build_tokenizer
from megatron_ltd.data.worker_processes import WorkerProcesses
from megatron_ltd.errors import DataError


@dataclass(frozen=True)
class EncodingPlan:
    """How documents become tokens.

    Attributes:
        json_keys: each key of an object becomes a corpus of its own.
        append_eod: end every document that has a token with the end-of-document token.
    """

    tokenizer: DataConfig
    vocab_size: int | None
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False

    def build_tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.tokenizer, self.vocab_size)


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of one key: all tokens back to back, and the tokens of each document."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class Progress:
    """How far a run is; text is counted decompressed, the share by input bytes on disk (None: read from a pipe)."""

    documents: int
    text_bytes: int
    share: float | None
    seconds: float

    def line(self) -> str:
        left = f", {100 * self.share:.0f}% of the input, about {self.seconds / self.share - self.seconds:.0f} s left" \
            if self.share else ""
        return (f"Processed {self.documents} documents ({self.documents / self.seconds:.1f} docs/s, "
                f"{self.text_bytes / self.seconds / 1e6:.2f} MB/s){left}.")


@dataclass(frozen=True)
class WrittenCorpus:
    """One corpus of the output."""

    prefix: str
    documents: int
    tokens: int
    dtype: str


def preprocess(plan: EncodingPlan, inputs: Sequence[str], output_prefix: str, workers: int,
               report: Callable[[Progress], None], log_interval: int = 1000) -> list[WrittenCorpus]:
    """Writes `{output_prefix}_{key}_document` for each key.

    Args:
        inputs: files in order.
        workers: processes that tokenize; 1 tokenizes in this one.
        report: called about every `log_interval` documents and at the end.

    Raises:
        DataError: a line or file that cannot be read, or no document at all.
    """
    tokenizer = plan.build_tokenizer()
    files = [TextInput(path) for path in inputs]
    size_bytes = sum(file.size_bytes for file in files) if all(file.size_bytes for file in files) else 0
    started, count, text_bytes = time.monotonic(), 0, 0

    def progress() -> Progress:
        share = sum(file.read_bytes for file in files) / size_bytes if size_bytes else None
        return Progress(count, text_bytes, share, max(time.monotonic() - started, 1e-9))

    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedCorpusWriter(f"{output_prefix}_{key}_document", tokenizer.vocab_size))
                   for key in plan.json_keys]
        blocks = (block for file in files for block in file.blocks())
        for block_bytes, encoded in _encode_in_order(plan, blocks, workers):
            for writer, batch in zip(writers, encoded, strict=True):
                writer.add_documents(batch.tokens, batch.lengths[batch.lengths > 0], batch.lengths > 0)
            before, count = count, count + len(encoded[0].lengths)
            text_bytes += block_bytes
            if count // log_interval > before // log_interval:
                report(progress())
        if count == 0:
            raise DataError(f"No document in {', '.join(inputs)}: nothing to write.")
        report(progress())
    return [WrittenCorpus(writer.prefix, writer.documents, writer.tokens, writer.dtype.name) for writer in writers]


def encode_block(plan: EncodingPlan, block: Block) -> list[EncodedDocuments]:
    """Tokenizes the documents of a block, for each key."""
    tokenizer = _tokenizer(plan)
    encoded = []
    for texts in documents(block, plan.json_keys):
        ids = tokenizer.encode_batch(texts)
        if plan.append_eod:
            for document in ids:
                if document:  # as Megatron does: a document without tokens stays without tokens
                    document.append(tokenizer.eod)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
        encoded.append(EncodedDocuments(tokens, lengths))
    return encoded


_tokenizer = functools.lru_cache(maxsize=1)(EncodingPlan.build_tokenizer)


def _encode_in_order(plan: EncodingPlan, blocks: Iterator[Block],
                     workers: int) -> Iterator[tuple[int, list[EncodedDocuments]]]:
    """The size and the documents of each block, in order."""
    if workers == 1:
        for block in blocks:
            yield len(block.data), encode_block(plan, block)
        return
    waiting: deque[tuple[int, Future[list[EncodedDocuments]]]] = deque()
    with WorkerProcesses(functools.partial(encode_block, plan), workers) as pool:
        for block in blocks:
            waiting.append((len(block.data), pool.submit(block)))
            if len(waiting) > 2 * workers:
                size_bytes, future = waiting.popleft()
                yield size_bytes, future.result()
        while waiting:
            size_bytes, future = waiting.popleft()
            yield size_bytes, future.result()
