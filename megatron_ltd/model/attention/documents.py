"""Attention within documents without a mask, by kernels for packed sequences of any lengths.

They run on GPUs in half precision; elsewhere a mask does the same. The kept tokens of a document are one sequence. The
padding of a sample counts as a document, whose results are never used.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

_MULTIPLE = 64


@dataclass(frozen=True)
class Documents:
    """Where documents begin among the tokens of all samples, one sample after the other.

    Args:
        starts: then the number of tokens, as often as the bound exceeds the number of documents; int32.
        longest: no document has more tokens.
        causal: whether a token attends to no later one.

    Shapes:
        starts [bound + 1]
    """

    starts: torch.Tensor
    longest: int
    causal: bool


def has_kernel(device: torch.device, dtype: torch.dtype | None, head_dim: int) -> bool:
    """Whether torch's kernel takes such tensors."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
            and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0))


def most_documents(ids: torch.Tensor) -> int:
    """A bound on the number of documents, from the host's copy of their ids: a round number, so that compiled layers
    see few of them. Shapes: ids [b, s]"""
    found = len(ids) + int((ids[:, 1:] != ids[:, :-1]).sum())
    return -(-found // _MULTIPLE) * _MULTIPLE


def find_documents(ids: torch.Tensor, bound: int, *, causal: bool) -> Documents:
    """The documents of some tokens, in sequence order. The host does not wait. Shapes: ids [b, k], of any type"""
    begins = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True).flatten()
    number = begins.cumsum(0) - 1
    lengths = number.new_zeros(bound).scatter_add_(0, number, torch.ones_like(number))
    return Documents(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), ids.shape[1], causal)


def attend_in_documents(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                        documents: Documents) -> torch.Tensor:
    """Attention of each document to itself. Shapes: [b, n, k, d] -> [b, n, k, d]"""
    samples = query.shape[0]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [b k, n, d]
    out = varlen_attn(query, key, value, documents.starts, documents.starts, documents.longest, documents.longest,
                      window_size=(-1, 0 if documents.causal else -1))
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (samples, -1)).transpose(1, 2)
