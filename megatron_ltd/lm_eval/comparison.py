"""Whether two models differ on the same examples: paired bootstrap intervals of differences of metrics.

Metrics are functions of sums over examples: of a value x and a weight w, which is 1 where none is given.

    means            sum x / sum w
    perplexities     exp(-sum x / sum w), x the log-probability
    bits_per_byte    -sum x / sum w / ln 2

The examples are drawn again with replacement, the same for both models, and the interval spans the middle of the
differences that result (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; for language tasks
Koehn, https://aclanthology.org/W04-3250).
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_ltd.lm_eval.results import Samples

CHUNK = 1 << 20
"""Examples drawn at once."""


@dataclass(frozen=True)
class Difference:
    """The second value less the first.

    Args:
        interval: None where the examples are not paired.
        why_not: the reason.
        n: pairs.
    """

    first: float
    second: float
    n: int = 0
    interval: tuple[float, float] | None = None
    why_not: str = ""

    @property
    def value(self) -> float:
        return self.second - self.first

    @property
    def is_clear(self) -> bool:
        """The interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]


def of_sums(metric: str, sums: np.ndarray) -> np.ndarray:
    """The metric from sums of values and weights. Shapes: [..., 2] -> [...]"""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = sums[..., 0] / sums[..., 1]
        if "perplexity" in metric:
            return np.exp(-mean)
        return -mean / math.log(2) if metric.startswith("bits_per") else mean


def compare(metric: str, values: tuple[float, float], samples: tuple[Samples | None, Samples | None], *,
            confidence: float, resamples: int, seed: int) -> Difference:
    """The difference of a metric between two models, with its interval.

    Args:
        values: as reported.
        samples: of each model, in the same order; None where they were not kept.
    """
    def unpaired(reason: str) -> Difference:
        return Difference(*values, why_not=reason)

    mine, theirs = samples
    if mine is None or theirs is None:
        return unpaired("no values of single examples")
    if len(mine) != len(theirs):
        return unpaired(f"{len(mine)} examples and {len(theirs)}")
    for side, value in zip((mine, theirs), values, strict=True):
        column = _column([one for one in side if one is not None])
        if column is None or not math.isclose(float(of_sums(metric, column.sum(0))), value, rel_tol=1e-4, abs_tol=1e-9):
            return unpaired("not a function of sums over examples")
    both = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    first, second = (_column([pair[side] for pair in both]) for side in (0, 1))
    if first is None or second is None:
        return unpaired("no example that both models were asked")
    differences = resampled(metric, first, second, resamples, seed)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(differences, [tail, 1.0 - tail])
    return Difference(float(of_sums(metric, first.sum(0))), float(of_sums(metric, second.sum(0))), len(both),
                      (float(low), float(high)))


def resampled(metric: str, first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The differences of the metric in samples drawn with replacement.

    Shapes:
        first, second [n, 2] -> [resamples]
    """
    random, n = np.random.default_rng(seed), len(first)
    found: list[np.ndarray] = []
    rows = max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        drawn = random.integers(0, n, (min(rows, resamples - start), n))
        found.append(of_sums(metric, second[drawn].sum(1)) - of_sums(metric, first[drawn].sum(1)))
    return np.concatenate(found)


def _column(values: list[float | list[float]]) -> np.ndarray | None:
    """Values and weights. Shapes: -> [n, 2]; None for values of another form"""
    pairs = [value if isinstance(value, list) else [value, 1.0] for value in values]
    numeric = all(len(pair) == 2 and all(isinstance(one, int | float) for one in pair) for pair in pairs)
    return np.array(pairs, dtype=np.float64) if pairs and numeric else None
