"""ALiBi (https://arxiv.org/abs/2108.12409): instead of position embeddings, a bias on attention scores that falls with
the distance between query and key, with a slope of its own for each head."""


def slopes(heads: int) -> list[float]:
    """The slope of each head: 2^(-8 i / n) for n heads, i from 1, where n is a power of two. Otherwise those of the
    next lower power, followed by every other one of the next higher power, as in BLOOM."""
    lower = 1 << (heads.bit_length() - 1)
    plain = [2.0 ** (-8.0 * number / lower) for number in range(1, lower + 1)]
    return plain + [2.0 ** (-4.0 * number / lower) for number in range(1, 2 * (heads - lower), 2)]
