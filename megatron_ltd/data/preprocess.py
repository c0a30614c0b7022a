"""Text files to corpora: read in blocks, tokenize them in worker processes, write in the order of the input.

The order and the bytes of the output do not depend on the number of workers. A line that holds no document stops
everything, with its place, and nothing is left under the names of the output; or such lines are left out
(`rejected.py`).
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.config import DataConfig
from megatron_ltd.data.documents import BadLine, sorted_documents
from megatron_ltd.data.indexed_writer import IndexedCorpusWriter
from megatron_ltd.data.rejected import Policy, RejectedLines
from megatron_ltd.data.sentences import SentencePlan, SentenceSplitter
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
        sentences: every sentence becomes a sequence of its own; None: every document does.
        on_bad_line: fail, or leave out lines that hold no document.
    """

    tokenizer: DataConfig
    vocab_size: int | None
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    sentences: SentencePlan | None = None
    on_bad_line: Literal["fail"] | Policy = "fail"

    @property
    def level(self) -> str:
        """What a sequence is: the last part of a corpus's name."""
        return "document" if self.sentences is None else "sentence"

    def build_tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.tokenizer, self.vocab_size)


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of one key: all tokens back to back, the tokens of each sequence, the sequences of each document."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    sequences: NDArray[np.int64]


@dataclass(frozen=True)
class EncodedBlock:
    """A block of input: its size decompressed, its documents for each key, and its lines that hold none."""

    size_bytes: int
    documents: list[EncodedDocuments]
    bad: list[BadLine]


@dataclass(frozen=True)
class Progress:
    """How far a run is; text is counted decompressed, the share by input bytes on disk (None: read from a pipe)."""

    documents: int
    text_bytes: int
    share: float | None
    seconds: float
    rejected: int = 0

    def line(self) -> str:
        left = f", {100 * self.share:.0f}% of the input, about {self.seconds / self.share - self.seconds:.0f} s left" \
            if self.share else ""
        left += f", {self.rejected} bad lines left out" if self.rejected else ""
        return (f"Processed {self.documents} documents ({self.documents / self.seconds:.1f} docs/s, "
                f"{self.text_bytes / self.seconds / 1e6:.2f} MB/s){left}.")


@dataclass(frozen=True)
class WrittenCorpus:
    """One corpus of the output."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str


def preprocess(plan: EncodingPlan, inputs: Sequence[str], output_prefix: str, workers: int,
               report: Callable[[Progress], None], log_interval: int = 1000) -> list[WrittenCorpus]:
    """Writes `{output_prefix}_{key}_document`, or `_sentence`, for each key.

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
        return Progress(count, text_bytes, share, max(time.monotonic() - started, 1e-9), rejected.count)

    with ExitStack() as stack:
        rejected = stack.enter_context(RejectedLines("skip" if plan.on_bad_line == "fail" else plan.on_bad_line,
                                                     output_prefix))
        writers = [stack.enter_context(IndexedCorpusWriter(f"{output_prefix}_{key}_{plan.level}", tokenizer.vocab_size))
                   for key in plan.json_keys]
        blocks = (block for file in files for block in file.blocks())
        for block in _encode_in_order(plan, blocks, workers):
            for writer, batch in zip(writers, block.documents, strict=True):
                writer.add_documents(batch.tokens, batch.lengths, batch.sequences)
            for bad in block.bad:
                rejected.add(bad)
            before, count = count, count + len(block.documents[0].sequences)
            text_bytes += block.size_bytes
            if count // log_interval > before // log_interval:
                report(progress())
        if count == 0:
            raise DataError(f"No document in {', '.join(inputs)}: nothing to write.")
        report(progress())
    return [WrittenCorpus(writer.prefix, writer.documents, writer.sequences, writer.tokens, writer.dtype.name)
            for writer in writers]


def encode_block(plan: EncodingPlan, block: Block) -> EncodedBlock:
    """Tokenizes the documents of a block.

    Raises:
        DataError: the block has a bad line, and these are not to be left out.
    """
    fail = plan.on_bad_line == "fail"
    texts, bad = sorted_documents(block, plan.json_keys, most_bad=1 if fail else None)
    if fail and bad:
        raise DataError(f"{bad[0]} Correct or remove this line (file:line:byte) and run again, or leave such lines out "
                        "with --on-bad-line skip or quarantine; nothing was written.")
    return EncodedBlock(len(block.data), [_encode(plan, _tools(plan), column) for column in texts], bad)


def _encode(plan: EncodingPlan, tools: tuple[Tokenizer, SentenceSplitter | None],
            texts: list[str]) -> EncodedDocuments:
    tokenizer, splitter = tools
    parts = [[text] for text in texts] if splitter is None or plan.sentences is None else \
        [plan.sentences.cut(text, splitter) for text in texts]
    ids = iter(tokenizer.encode_batch([part for text in parts for part in text]))
    encoded: list[list[int]] = []
    sequences = np.empty(len(texts), dtype=np.int64)
    for number, text in enumerate(parts):
        found = [sequence for sequence in itertools.islice(ids, len(text)) if sequence]
        if plan.append_eod and found:  # as Megatron does: a document without tokens stays without tokens
            found[-1].append(tokenizer.eod)
        encoded += found
        sequences[number] = len(found)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    tokens = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
    return EncodedDocuments(tokens, lengths, sequences)


@functools.lru_cache(maxsize=1)
def _tools(plan: EncodingPlan) -> tuple[Tokenizer, SentenceSplitter | None]:
    return plan.build_tokenizer(), None if plan.sentences is None else plan.sentences.build()


def _encode_in_order(plan: EncodingPlan, blocks: Iterator[Block], workers: int) -> Iterator[EncodedBlock]:
    """The blocks, tokenized, in order."""
    if workers == 1:
        for block in blocks:
            yield encode_block(plan, block)
        return
    waiting: deque[Future[EncodedBlock]] = deque()
    with WorkerProcesses(functools.partial(encode_block, plan), workers) as pool:
        for block in blocks:
            waiting.append(pool.submit(block))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
