"""The microbatches of a step, as a function of the samples consumed before it.

A step of a global batch of g samples reads samples [consumed, consumed + g) of the dataset. Cut into stretches of
micro_batch_size x dp_size samples, data-parallel rank r takes samples [r, r + 1) x micro_batch_size of each stretch
(the order of Megatron-LM). So which samples a step holds depends neither on the layout nor on how often the run was
stopped.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megatron_ltd.data.sample import Dataset
from megatron_ltd.errors import ConfigError, DataError

Batch = dict[str, torch.Tensor]
"""tokens, labels [b, s] int64; loss_mask [b, s] float32; position_ids, document_ids [b, s] int64 where configured;
sample_ids [b] int64: positions in the run's stream of samples, the same whatever the layout."""


def sample_ids(consumed_samples: int, global_batch_size: int, micro_batch_size: int, dp_rank: int,
               dp_size: int) -> list[range]:
    """The samples of each microbatch of one data-parallel rank."""
    stretch = micro_batch_size * dp_size
    if global_batch_size < 1 or global_batch_size % stretch:
        raise ConfigError(f"--global-batch-size = {global_batch_size} must be a multiple of --micro-batch-size x "
                          f"data-parallel size = {micro_batch_size} x {dp_size} = {stretch}.")
    starts = range(consumed_samples + dp_rank * micro_batch_size, consumed_samples + global_batch_size, stretch)
    return [range(start, start + micro_batch_size) for start in starts]


def read_microbatch(dataset: Dataset, ids: range) -> Batch:
    """Reads and stacks samples.

    Raises:
        DataError: of this process alone, since another one reads other samples, or from another disk.
    """
    try:
        return _stacked(dataset, ids)
    except DataError as error:
        error.everywhere = False
        raise


def _stacked(dataset: Dataset, ids: range) -> Batch:
    if ids.stop > len(dataset):
        raise DataError(f"The run asks for sample {ids.stop - 1}, and the dataset holds {len(dataset)}: it was built "
                        "for a shorter run.")
    samples = [dataset.sample(i) for i in ids]
    batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    batch["sample_ids"] = torch.arange(ids.start, ids.stop, dtype=torch.int64)
    return batch


def microbatches(dataset: Dataset, consumed_samples: int, global_batch_size: int, micro_batch_size: int, dp_rank: int,
                 dp_size: int) -> list[Batch]:
    """The microbatches of one step of one data-parallel rank."""
    return [read_microbatch(dataset, ids)
            for ids in sample_ids(consumed_samples, global_batch_size, micro_batch_size, dp_rank, dp_size)]


class Loader:
    """`microbatches`, with the next step read in the background.

    Stretches of samples do not depend on the global batch size, so what was read ahead is of use to a step of any size.
    An error in the background is raised by the step that needs the samples.

    Args:
        num_workers: threads that read ahead; 0 reads when asked.
    """

    def __init__(self, dataset: Dataset, micro_batch_size: int, dp_rank: int, dp_size: int, num_workers: int = 0):
        self._dataset = dataset
        self._share = (micro_batch_size, dp_rank, dp_size)
        self._ahead: dict[range, Future[Batch]] = {}
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="samples") if num_workers > 0 else None

    def step(self, consumed_samples: int, global_batch_size: int) -> list[Batch]:
        """The microbatches of the step after `consumed_samples` samples."""
        if self._pool is None:
            return microbatches(self._dataset, consumed_samples, global_batch_size, *self._share)
        now = sample_ids(consumed_samples, global_batch_size, *self._share)
        then = sample_ids(consumed_samples + global_batch_size, global_batch_size, *self._share)
        wanted = now + [ids for ids in then if ids.stop <= len(self._dataset)]
        for ids in self._ahead.keys() - set(wanted):
            self._ahead.pop(ids).cancel()
        for ids in wanted:
            if ids not in self._ahead:
                self._ahead[ids] = self._pool.submit(read_microbatch, self._dataset, ids)
        return [self._ahead.pop(ids).result() for ids in now]

    def close(self) -> None:
        """Stops reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
