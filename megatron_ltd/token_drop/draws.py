"""Random draws for a whole step: a pure function of (seed, step, layer), in plain integers.

The same hash as in `sampling.py`, which draws tokens for (seed, sample, layer), with the step in place of the sample
and with separate layer numbers.
"""

_WORD = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
STEP_DRAWS = 1 << 21
"""Added to the layer when steps are hashed rather than samples, so that the two never draw the same numbers."""


def _splitmix64(x: int) -> int:
    """The finaliser of splitmix64."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
    return x ^ (x >> 31)


def uniform(seed: int, step: int, layer: int) -> float:
    """A number in [0, 1) with 53 random bits, independent between steps and layers."""
    seeded = _splitmix64((seed + _GOLDEN) & _WORD)
    of_layer = _splitmix64(seeded ^ ((layer + STEP_DRAWS + 1) * _GOLDEN) & _WORD)
    state = _splitmix64(of_layer ^ ((step + 1) * _MIX_1) & _WORD)
    return (_splitmix64(state) >> 11) / (1 << 53)
