"""Text files to corpora: read in blocks, tokenize them, write behind that in the order of the input.

The order and the bytes of the output do not depend on the number of workers. A line that holds no document stops
the run, which names its place and leaves nothing under the names of the output; or such lines are left out
(`rejected.py`). From time to time the work so far is brought to disk with a record of the progress (`run_state.py`),
so that a run that was killed, or failed, can be resumed.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from megatron_ltd.data.corpus.indexed import IndexedCorpus
from megatron_ltd.data.corpus.manifest import SourceFacts
from megatron_ltd.data.corpus.partial_files import publish_corpus
from megatron_ltd.data.corpus.writer import IndexedCorpusWriter
from megatron_ltd.data.preprocess.behind import Behind
from megatron_ltd.data.preprocess.encoding import EncodedBlock, EncodingPlan
from megatron_ltd.data.preprocess.in_order import encode_in_order
from megatron_ltd.data.preprocess.rejected import RejectedLines
from megatron_ltd.data.preprocess.run_state import RunState, load_state, remove_state, save_state
from megatron_ltd.data.preprocess.table_input import HfSource, open_input
from megatron_ltd.data.preprocess.text_input import START, Block
from megatron_ltd.data.text.beginning import chosen_bos
from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, DataError
from megatron_ltd.log import Console

CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class Progress:
    """The progress of a run; text is counted decompressed, the share by input bytes on disk (None: input is a pipe)."""

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


def preprocess(plan: EncodingPlan, inputs: Sequence[str | HfSource], output_prefix: str, workers: int,
               report: Callable[[Progress], None], log_interval: int = 1000, resume: bool = False,
               checkpoint_seconds: float = CHECKPOINT_SECONDS) -> list[IndexedCorpus]:
    """Writes `{output_prefix}_{key}_document`, or `_sentence`, for each key.

    Args:
        inputs: files and datasets in order.
        workers: processes that tokenize, this one among them.
        report: called about every `log_interval` documents and at the end.
        resume: continue an interrupted run with the same settings and files; start anew if there is none.
        checkpoint_seconds: time between two records of the progress.

    Raises:
        ConfigError: the interrupted run had other settings or files.
        DataError: a line or file that cannot be read, or no document at all.
    """
    run = _Run(plan, inputs, output_prefix, resume)
    if not run.state.complete:
        run.write(workers, report, log_interval, checkpoint_seconds)
    for prefix in plan.prefixes(output_prefix):
        publish_corpus(prefix)
    run.rejected.publish()
    remove_state(output_prefix)
    return [IndexedCorpus(prefix) for prefix in plan.prefixes(output_prefix)]


class _Run:
    """One run: `write` leaves finished partial files and a state that says so."""

    def __init__(self, plan: EncodingPlan, inputs: Sequence[str | HfSource], output_prefix: str, resume: bool):
        self.plan, self.inputs, self.output_prefix = plan, inputs, output_prefix
        self.tokenizer, remark = plan.choose_tokenizer()
        if remark is not None:
            Console().warn(remark)
        _, of_bos = chosen_bos(self.tokenizer, plan.tokenizer.bos_token)
        of_eod = (self.tokenizer.eod, self.tokenizer.remark)[1] if plan.append_eod else None
        for said in (of_bos, of_eod):
            if said is not None:
                Console().line(said)
        self.files = [open_input(source, plan.json_keys) for source in inputs]
        key = _key(plan, inputs, self.tokenizer)
        found = load_state(output_prefix, key) if resume else None
        if found is not None and not all(isinstance(source, HfSource) or os.path.isfile(source) for source in inputs):
            raise ConfigError("--resume: --input holds a pipe, which cannot be read again from where the run was. Run "
                              "without --resume.")
        self.resumed, self.state = found is not None, found or RunState(key)
        self.rejected = RejectedLines(plan.on_bad_line == "quarantine", output_prefix, self.state.rejected)
        for file in self.files[:self.state.file]:
            file.read_bytes = file.size_bytes
        sizes = [file.size_bytes for file in self.files]
        self.size_bytes = sum(sizes) if all(sizes) else 0
        self.started = time.monotonic() - self.state.seconds
        self.file, self.place = self.state.file, self.state.place
        self.count, self.text_bytes = self.state.documents, self.state.text_bytes

    def write(self, workers: int, report: Callable[[Progress], None], log_interval: int,
              checkpoint_seconds: float) -> None:
        """Reads, tokenizes and writes all that is not yet there."""
        with ExitStack() as stack:
            marks = self.state.marks if self.resumed else [None] * len(self.plan.json_keys)
            self.writers = [stack.enter_context(IndexedCorpusWriter(prefix, self.tokenizer.vocab_size, resume=mark))
                            for prefix, mark in zip(self.plan.prefixes(self.output_prefix), marks, strict=True)]
            stack.enter_context(self.rejected)
            if not self.resumed:
                remove_state(self.output_prefix)
            self.rejected.keep = self.resumed
            behind = stack.enter_context(Behind())
            self.first_read_bytes = sum(file.read_bytes for file in self.files)
            last, self.began = time.monotonic(), time.process_time()
            for number, place, encoded in encode_in_order(self.plan, self.tokenizer, self._blocks(), workers,
                                                          self._seconds_left):
                self.file, self.place, before = number, place, self.count
                behind.call(self._add, encoded)
                self.count += len(encoded.documents[0].sequences)
                self.text_bytes += encoded.size_bytes
                del encoded
                if self.count // log_interval > before // log_interval:
                    report(self._progress())
                if time.monotonic() - last >= checkpoint_seconds:
                    behind.wait()
                    self._save()
                    last = time.monotonic()
            behind.wait()
            if self.count == 0:
                raise DataError(f"No document in {', '.join(map(str, self.inputs))}: nothing to write.")
            report(self._progress())
            self._describe()
            self._save(complete=True)

    def _add(self, block: EncodedBlock) -> None:
        for writer, batch in zip(self.writers, block.documents, strict=True):
            writer.add_documents(batch.tokens, batch.lengths, batch.sequences)
        for bad in block.bad:
            self.rejected.add(bad)

    def _progress(self) -> Progress:
        share = sum(file.read_bytes for file in self.files) / self.size_bytes if self.size_bytes else None
        return Progress(self.count, self.text_bytes, share, max(time.monotonic() - self.started, 1e-9),
                        self.rejected.count)

    def _save(self, complete: bool = False) -> None:
        """Brings everything so far to disk, and then the record of it."""
        sources = self.state.sources + tuple(file.sha256 for file in self.files[len(self.state.sources):self.file])
        marks = () if complete else tuple(writer.mark() for writer in self.writers)
        state = RunState(self.state.key, self.file, self.place, self.count, self.text_bytes,
                         time.monotonic() - self.started, sources, self.rejected.mark(), marks, complete)
        save_state(self.output_prefix, state)
        self.state = state
        self.rejected.keep = True
        for writer in self.writers:
            writer.keep = True

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        """What is left of the input: number of the file, and block."""
        for number in range(self.state.file, len(self.files)):
            start = self.state.place if number == self.state.file else START
            for block in self.files[number].blocks(start):
                yield number, block

    def _seconds_left(self) -> float:
        """Processor time that the rest of the input takes at the speed so far; infinite where its size is unknown."""
        now = sum(file.read_bytes for file in self.files)
        if not self.size_bytes or now == self.first_read_bytes:
            return math.inf
        return (time.process_time() - self.began) * (self.size_bytes - now) / (now - self.first_read_bytes)

    def _describe(self) -> None:
        """Completes the corpora and writes their manifests."""
        plan = self.plan
        digests = self.state.sources + tuple(file.sha256 for file in self.files[len(self.state.sources):])
        sources = [SourceFacts(file.size_bytes, digest, file.path)
                   for file, digest in zip(self.files, digests, strict=True)]
        bos, _ = chosen_bos(self.tokenizer, plan.tokenizer.bos_token)
        for writer, key in zip(self.writers, plan.json_keys, strict=True):
            writer.describe(self.tokenizer.digest, self.tokenizer.vocab_size, {
                "tokenizer_type": plan.tokenizer.tokenizer_type, "tokenizer_files": list(self.tokenizer.files),
                "json_key": key, "append_eod": plan.append_eod, **({} if bos is None else {"bos_token_id": bos}),
                **({"eod_token_id": self.tokenizer.eod} if plan.append_eod else {}),
                "sentences": None if plan.sentences is None else dataclasses.asdict(plan.sentences),
                "bad_lines_left_out": self.rejected.count}, sources)


def _key(plan: EncodingPlan, inputs: Sequence[str | HfSource], tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the bytes of the output, by the flags that give it."""
    found = [os.stat(path) for path in inputs if not isinstance(path, HfSource)]
    begun = {"--bos-token": chosen_bos(tokenizer, plan.tokenizer.bos_token)[0]} if plan.tokenizer.bos_token else {}
    ended = {"--eod-token": plan.tokenizer.eod_token} if plan.tokenizer.eod_token else {}
    return {"--tokenizer-type": plan.tokenizer.tokenizer_type, "the tokenizer's digest": tokenizer.digest,
            **begun, **ended,
            "--json-keys": plan.json_keys, "--append-eod": plan.append_eod, "--on-bad-line": plan.on_bad_line,
            "--split-sentences": None if plan.sentences is None else dataclasses.asdict(plan.sentences),
            "--input": list(map(str, inputs)),
            "sizes and times of the input": [[s.st_size, s.st_mtime_ns] for s in found]}
