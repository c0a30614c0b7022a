"""Which tokens a dropped layer keeps: a pure function of (seed, sample, layer).

    kept(seed, sample, layer) = the k positions of the sequence with the smallest hash, in ascending order

The hash of a position is the splitmix64 stream of a state mixed from seed, layer and global sample index. There is
no generator and no state, so tensor-parallel ranks agree without communication; every split of the batch over
microbatches, stages or data-parallel ranks draws the same sets; recomputation and resume reproduce them; and dropout is
not affected. A global sample index is never used twice in a run, so the sets differ from step to step.

The sets are uniform over the positions (random-LTD, https://arxiv.org/abs/2211.11586, section 3), independent between
samples and layers, and nested: a larger k keeps a superset.
"""

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64, whose own `>>` copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64 (arithmetic modulo 2^64); a bijection that mixes every bit."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def stream_state(seed: int, sample_ids: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
    """One 64-bit state per (layer, sample).

    Shapes:
        sample_ids [b] int64, layers [l] int64 -> [l, b] int64
    """
    seeded = splitmix64(torch.full_like(layers, seed) + _GOLDEN)
    per_layer = splitmix64(seeded ^ ((layers + 1) * _GOLDEN))
    return splitmix64(per_layer[:, None] ^ ((sample_ids[None, :] + 1) * _MIX_1))


def kept_positions(seed: int, sample_ids: torch.Tensor, layers: torch.Tensor, *, sequence_tokens: int,
                   kept_tokens: int, strata: int = 1) -> torch.Tensor:
    """Positions that each dropped layer keeps of each sample, ascending.

    Args:
        seed: the run's seed.
        sample_ids: global sample indices, [b] int64.
        layers: global layer ids, [l] int64.
        sequence_tokens: s; a multiple of `strata`.
        kept_tokens: k, 1 <= k <= s; a multiple of `strata`.
        strata: equal spans of the sequence that keep k / strata tokens each. With more than one, a sequence-parallel
            shard has a fixed number of kept tokens; with one, the set is uniform as in the paper.

    Shapes:
        -> [l, b, k] int64
    """
    span = sequence_tokens // strata
    position_bits = max(1, (sequence_tokens - 1).bit_length())
    positions = torch.arange(sequence_tokens, device=sample_ids.device)
    state = stream_state(seed, sample_ids, layers)
    hashes = splitmix64(state[:, :, None] + (positions + 1) * _GOLDEN)  # [l, b, s]
    # The position in the low bits makes keys distinct, so that the result does not depend on how the kernel sorts ties.
    keys = (_shift_right(hashes, 1 + position_bits) << position_bits) | positions
    spans = keys.unflatten(2, (strata, span))  # [l, b, strata, s / strata]
    smallest = spans.topk(kept_tokens // strata, dim=3, largest=False, sorted=False).values
    return (smallest & ((1 << position_bits) - 1)).sort(dim=3).values.flatten(2)  # [l, b, k]


def positions_of_largest(priority: torch.Tensor, kept_tokens: int, strata: int = 1) -> torch.Tensor:
    """Positions of the k / strata tokens of largest priority in each of `strata` equal spans, ascending; ties go to the
    earlier token.

    Shapes:
        priority [b, s] -> [b, k] int64
    """
    span = priority.shape[1] // strata
    # A stable sort: which of two equal tokens comes first must not depend on the machine's sorting kernel.
    order = priority.unflatten(1, (strata, span)).argsort(dim=2, descending=True, stable=True)
    chosen = order[:, :, :kept_tokens // strata].sort(dim=2).values  # [b, strata, k / strata]
    starts = torch.arange(strata, device=priority.device)[:, None] * span
    return (chosen + starts).flatten(1)


def stream_rows(kept: torch.Tensor) -> torch.Tensor:
    """Rows of the flattened residual stream [s * b, h] that hold the kept tokens, in [k, b] order.

    Shapes:
        kept [b, k] -> [k * b]
    """
    microbatch = kept.shape[0]
    return (kept.t() * microbatch + torch.arange(microbatch, device=kept.device)).flatten()
