"""What a dataset is: samples as a function of their index alone, in the form that a training step takes."""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Sample = dict[str, NDArray[Any]]


class Dataset(Protocol):
    """Samples by index; what an index means depends on nothing else.

    Attributes:
        digest: SHA-256 of all that decides the samples, for comparing processes.
    """

    digest: str

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """The arrays of a sample that a training step takes.

        Raises:
            IndexError: no such sample.
        """


def check_index(index: int, dataset: Sized) -> None:
    """Raises IndexError unless the dataset has a sample of this index."""
    if not 0 <= index < len(dataset):
        raise IndexError(f"sample {index} of {len(dataset)}")


@dataclass(frozen=True)
class GPTSampleForm:
    """Turns seq_length + 1 consecutive tokens into a GPT sample.

    A document ends with its end-of-document token, so the token after it is the first of the next one.
    """

    seq_length: int
    vocab_size: int
    eod: int
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False

    def arrays(self, text: NDArray[np.int64]) -> Sample:
        """The sample of a stretch of text.

        Shapes:
            text [s + 1] -> tokens, labels [s] int64; loss_mask [s] float32, 0 where the label does not count in the
            loss; position_ids [s] int64 with --reset-position-ids; with --reset-attention-mask document_ids [s] int64,
            counting from 0: a token attends only to tokens of its own document.
        """
        tokens, labels = text[:-1], text[1:]
        loss_mask = np.ones(len(tokens), dtype=np.float32)
        sample: Sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
        if not (self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask):
            return sample
        ends = tokens == self.eod
        if self.eod_mask_loss:
            loss_mask[ends] = 0.0
        if not (self.reset_position_ids or self.reset_attention_mask):
            return sample
        documents = np.zeros(len(tokens), dtype=np.int64)
        np.cumsum(ends[:-1], out=documents[1:])
        if self.reset_position_ids:
            starts = np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1])
            sample["position_ids"] = np.arange(len(tokens), dtype=np.int64) - starts[documents]
        if self.reset_attention_mask:
            sample["document_ids"] = documents
        return sample
