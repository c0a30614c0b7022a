"""N-gram embeddings: what a token enters the layers with also holds vectors of the tokens that end in it.

    input of token i    word[t_i] + table[row(t_(i-1), t_i)] + table[row(t_(i-2), t_(i-1), t_i)] + ...

The row is a hash, so n-grams share rows; each length has rows of its own. A look-up is no product, so a larger table
costs memory and none of the FLOPs that are counted, and the first layers need not compute what follows from neighbours
alone. Tokens before the sample, and of other documents where attention stops at them, count as one more token.

Hashed tables added to the word embedding are those of Over-Tokenized Transformers (https://arxiv.org/abs/2501.16975,
section 3.2), there with several tables of narrow rows; Engram (https://arxiv.org/abs/2601.07372) adds them in deeper
layers and gates them.
"""

import torch

from megatron_ltd.config import ModelConfig

_PRIME = 2**31 - 1
_OF_TOKENS, _OF_KEYS = 1_103_515_245, 48_271
"""Multipliers below the prime, so that no product exceeds 63 bits."""
NONE = -1
"""Stands for a token that is not there."""


def ngram_rows(tokens: torch.Tensor, config: ModelConfig, *, documents: torch.Tensor | None = None,
               before: torch.Tensor | None = None) -> torch.Tensor | None:
    """Rows of the table for the n-grams that end in each token, the shortest first; None for a model without a table.

    Args:
        tokens: may be NONE.
        documents: which document each token belongs to; None: all to one.
        before: tokens that precede these, the latest last; None: there are none.

    Shapes:
        tokens [b, s] int64, or bags [b, s, k]; documents [b, s]; before [b, --ngram-length - 1]
        -> [b, s, --ngram-length - 1], or of bags [b, s, k, --ngram-length - 1]
    """
    if config.ngram_rows is None:
        return None
    text = tokens.flatten(1)
    earlier = config.ngram_length - 1
    if before is None:
        before = text.new_full((text.shape[0], earlier), NONE)
    known = torch.cat((before, text), dim=1) + 1  # 0 stands for none
    inside = None if documents is None else torch.nn.functional.pad(documents, (earlier, 0), value=NONE)
    key, rows = known[:, earlier:], []
    for back in range(1, earlier + 1):
        previous = known[:, earlier - back:known.shape[1] - back]
        if documents is not None and inside is not None:
            previous = previous * (inside[:, earlier - back:inside.shape[1] - back] == documents)
        key = (key * _OF_TOKENS + previous) % _PRIME
        rows.append(key * _OF_KEYS % _PRIME % config.ngram_rows + (back - 1) * config.ngram_rows)
    return torch.stack(rows, dim=-1).view(*tokens.shape, earlier)
