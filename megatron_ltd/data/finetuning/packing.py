"""Examples of different lengths packed into samples of one length, each with its own positions and attention.

    tokens         P P P R R R E | P R R E | . .       of each example all but the last token, then filling
    labels         P P R R R E   | ...                 the token after
    loss_mask      0 0 1 1 1 1   | 0 1 1 1 | 0 0       1 where the label is of a response, its end included
    position_ids   0 1 2 3 4 5   | 0 1 2 3 | 0 1
    document_ids   0 0 0 0 0 0   | 1 1 1 1 | 2 2       attention stays within one

Which examples share a sample is decided once, by best fit in order of falling length; the order of samples is drawn
for each epoch. Examples do not see each other, so what shares a sample changes no loss.
"""

import hashlib
from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from megatron_ltd.data.finetuning.responses import Responses
from megatron_ltd.data.sample import Sample, check_index


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Packs of examples whose lengths add up to at most `capacity`: each example, longest first, goes where it leaves
    the least space. A function of the lengths alone."""
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, pack), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if length > capacity:
            raise ValueError(f"example {index} of length {length} exceeds {capacity}")
        found = bisect_left(spaces, (length, 0))
        if found < len(spaces):
            space, pack = spaces.pop(found)
        else:
            space, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        if space > length:
            insort(spaces, (space - length, pack))
    return packs


class PackedDataset:
    """Samples of packed prompts and responses.

    Args:
        filling: id of the token after the last example, which is neither seen nor predicted by any.
    """

    def __init__(self, responses: Responses, seq_length: int, filling: int):
        self.responses, self.seq_length, self.filling = responses, seq_length, filling
        self.packs = best_fit(responses.lengths, seq_length)
        self.digest = hashlib.sha256(f"packed {responses.digest} {seq_length} {filling}".encode()).hexdigest()

    @property
    def fullness(self) -> float:
        """Share of the samples' tokens that is not filling."""
        return float(self.responses.lengths.sum()) / (len(self.packs) * self.seq_length)

    def __len__(self) -> int:
        return len(self.packs)

    def sample(self, index: int) -> Sample:
        check_index(index, self)
        length = self.seq_length
        tokens, labels = (np.full(length, self.filling, dtype=np.int64) for _ in range(2))
        loss_mask = np.zeros(length, dtype=np.float32)
        positions, documents = (np.zeros(length, dtype=np.int64) for _ in range(2))
        start = 0
        for number, example in enumerate(self.packs[index]):
            text, learned = self.responses.example(example)
            stop = start + len(text) - 1
            tokens[start:stop], labels[start:stop] = text[:-1], text[1:]
            # The label of the last token of the prompt is the first of the response; without a prompt, the first token
            # of a response has nothing that it could be predicted from.
            loss_mask[start:stop] = learned[1:]
            positions[start:stop], documents[start:stop] = np.arange(stop - start), number
            start = stop
        positions[start:], documents[start:] = np.arange(length - start), len(self.packs[index])
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions,
                "document_ids": documents}
