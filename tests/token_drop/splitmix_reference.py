"""Which tokens are kept, once more: unbounded Python integers, one position at a time, sorted."""

WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15
"""The increment of splitmix64, the golden ratio of 2^64."""


def finalise(z: int) -> int:
    """What splitmix64 does with its counter before it hands it out."""
    z %= WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def state(seed: int, sample: int, layer: int) -> int:
    of_layer = finalise(finalise(seed + GAMMA) ^ ((layer + 1) * GAMMA) % WORD)
    return finalise(of_layer ^ ((sample + 1) * 0xBF58476D1CE4E5B9) % WORD)


def kept(seed: int, sample: int, layer: int, *, tokens: int, keep: int, strata: int = 1) -> list[int]:
    """Positions with the smallest hashes of each span, ascending; the lower position wins a tie."""
    start, span = state(seed, sample, layer), tokens // strata
    unused_bits = 1 + max(1, (tokens - 1).bit_length())
    chosen = []
    for first in range(0, tokens, span):
        ranked = sorted(range(first, first + span),
                        key=lambda position: (finalise(start + (position + 1) * GAMMA) >> unused_bits, position))
        chosen += sorted(ranked[:keep // strata])
    return chosen
