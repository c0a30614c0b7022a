"""Tokenizes blocks in this process and, where much is left to do, in others as well; gives them in order.

A worker process takes a second of processor time to start and to load the tokenizer. This one does not wait for them:
it tokenizes from the beginning, and goes on wherever all others are busy. So more workers do not make a run slower.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack

from megatron_ltd.data.preprocess.encoding import EncodedBlock, EncodingPlan, encode_block, encode_in_worker
from megatron_ltd.data.preprocess.text_input import Block, Place
from megatron_ltd.data.preprocess.worker_processes import worker_processes
from megatron_ltd.data.text.fast_bpe import Engine, FastBpe
from megatron_ltd.data.text.tokenizer import Tokenizer

_HELP_SECONDS = 4.0  # of work left, below which a worker's start does not pay off
_AHEAD_BLOCKS = 8


def encode_in_order(plan: EncodingPlan, tokenizer: Tokenizer, blocks: Iterator[tuple[int, Block]], workers: int,
                    seconds_left: Callable[[], float]) -> Iterator[tuple[int, Place, EncodedBlock]]:
    """Each block, tokenized, with the number of its file and the place where it ends there.

    Args:
        tokenizer: that of the plan.
        workers: processes that tokenize, this one among them.
        seconds_left: an estimate of the processor time that the rest of the input takes this process.
    """
    engine: Engine = "gigatoken" if isinstance(tokenizer, FastBpe) else "tokenizers"
    function = functools.partial(encode_in_worker, dataclasses.replace(plan, engine=engine))
    waiting: deque[tuple[int, Place, Future[EncodedBlock]]] = deque()
    starting: list[Future[EncodedBlock]] | None = None
    with ExitStack() as stack:
        for number, block in blocks:
            if workers > 1 and starting is None and seconds_left() > _HELP_SECONDS:
                submit = stack.enter_context(worker_processes(function, workers - 1))
                starting = [submit(None) for _ in range(workers - 1)]
            ready = sum(future.done() for future in starting or ())
            if sum(not future.done() for _, _, future in waiting) < 2 * ready:
                future = submit(block)
            else:
                future = _done(functools.partial(encode_block, plan, block, tokenizer))
            waiting.append((number, block.end, future))
            del block  # a long document is not to be held while the next is read
            while waiting and (waiting[0][2].done() or len(waiting) > _AHEAD_BLOCKS * workers):
                yield _first(waiting)
        while waiting:
            yield _first(waiting)


def _first(waiting: deque[tuple[int, Place, Future[EncodedBlock]]]) -> tuple[int, Place, EncodedBlock]:
    number, place, future = waiting.popleft()
    return number, place, future.result()


def _done(work: Callable[[], EncodedBlock]) -> Future[EncodedBlock]:
    """What was made or raised, so that an earlier block's error comes first."""
    future: Future[EncodedBlock] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
