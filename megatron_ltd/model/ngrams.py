"""N-gram embeddings: what a token enters the layers with also holds vectors of the tokens that end in it.

    input of token i    word[t_i] + sum over n = 2 .. N of signs(t_(i-n+1) .. t_i) * table[row(t_(i-n+1) .. t_i)]

The row is a hash, so n-grams share rows; each length has rows of its own. An n-gram reads its row with one of many
fixed patterns of signs, another hash, so that those who share a row are noise to each other and no bias
(https://arxiv.org/abs/1504.04788). A look-up is no product, so a larger table costs memory and none of the
FLOPs that are counted, and the first layers need not compute what follows from neighbours alone. Tokens before the
sample, and of other documents where attention stops at them, count as one more token.

Hashed tables added to the word embedding are those of Over-Tokenized Transformers (https://arxiv.org/abs/2501.16975,
section 3.2), there with several tables of narrow rows; Engram (https://arxiv.org/abs/2601.07372) adds them in deeper
layers and gates them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_ltd.config.model import ModelConfig

_PRIME = 2**31 - 1
_OF_TOKENS, _OF_ROWS, _OF_PATTERNS = 1_103_515_245, 48_271, 69_621
"""Multipliers below the prime, so that no product exceeds 63 bits."""
PATTERNS = 1024
"""Patterns of signs."""
NONE = -1
"""Stands for a token that is not there."""


class NGrams(NamedTuple):
    """The n-grams that end in each token, the shortest first: where the table has their vectors, and with which signs.

    Shapes:
        rows, patterns [b, s, --ngram-length - 1] int64, or of bags [b, s, k, --ngram-length - 1]
    """

    rows: torch.Tensor
    patterns: torch.Tensor


def sign_patterns(width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """1 or -1, the same on every device. Shapes: -> [PATTERNS, width]"""
    drawn = torch.randint(2, (PATTERNS, width), generator=torch.Generator().manual_seed(0))
    return (2 * drawn - 1).to(device=device, dtype=dtype)


def ngrams_of(tokens: torch.Tensor, config: ModelConfig, *, documents: torch.Tensor | None = None,
              before: torch.Tensor | None = None) -> NGrams | None:
    """The n-grams of some tokens; None for a model without a table.

    Args:
        tokens: may be NONE.
        documents: which document each token belongs to; None: all to one.
        before: tokens that precede these, the latest last; None: there are none.

    Shapes:
        tokens [b, s] int64, or bags [b, s, k]; documents [b, s]; before [b, --ngram-length - 1]
    """
    if config.ngram_rows is None:
        return None
    text = tokens.flatten(1)
    earlier = config.ngram_length - 1
    if before is None:
        before = text.new_full((text.shape[0], earlier), NONE)
    known = torch.cat((before, text), dim=1) + 1  # 0 stands for none
    key, rows, patterns = known[:, earlier:], [], []
    for back in range(1, earlier + 1):
        previous = known[:, earlier - back:known.shape[1] - back]
        if documents is not None:
            previous = previous * (F.pad(documents, (back, 0), value=NONE)[:, :-back] == documents)
        key = (key * _OF_TOKENS + previous) % _PRIME
        rows.append(key * _OF_ROWS % _PRIME % config.ngram_rows + (back - 1) * config.ngram_rows)
        patterns.append(key * _OF_PATTERNS % _PRIME % PATTERNS)
    return NGrams(*(torch.stack(found, dim=-1).view(*tokens.shape, earlier) for found in (rows, patterns)))
