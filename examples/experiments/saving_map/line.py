"""What an arm saves: the FLOPs of a dense run with the same final loss, read off a curve fitted to dense runs.

    loss = floor + scale * FLOPs ^ -power

is fitted by least squares to dense runs, for each arm to those of the three budgets nearest to its own FLOPs: one curve
through budgets that differ twentyfold misses some of them by more than the savings to be measured. Each budget has the
peak rate that is best there, and a schedule that decays fully.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

POWERS = np.geomspace(0.02, 3.0, 600)
LEAST_BUDGETS = 3
DRAWS = 2000

Losses = Mapping[int, float]
"""Final loss by seed."""


@dataclass(frozen=True)
class Line:
    """The fitted curve, and the FLOPs between which it was fitted."""

    floor: float
    scale: float
    power: float
    low: float
    high: float

    def loss(self, flops: float) -> float:
        return self.floor + self.scale * (flops / self.low) ** -self.power

    def flops(self, loss: float) -> float:
        """FLOPs with which a dense run is expected to end at this loss; infinite at and below the floor."""
        if loss <= self.floor:
            return math.inf
        return self.low * (self.scale / (loss - self.floor)) ** (1.0 / self.power)


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The curve through (FLOPs, loss) points.

    For a given power the curve is linear in floor and scale, so only the power is searched.

    Raises:
        ValueError: fewer than three budgets, or losses that do not fall with FLOPs.
    """
    flops, losses = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    if len(set(flops)) < LEAST_BUDGETS:
        raise ValueError(f"{len(set(flops))} dense budgets; a curve needs {LEAST_BUDGETS}")
    low = float(flops.min())
    falls = (flops / low) ** -POWERS[:, None]  # [powers, points]
    centred, residuals = falls - falls.mean(axis=1, keepdims=True), losses - losses.mean()
    scales = centred @ residuals / np.square(centred).sum(axis=1)
    errors = np.square(scales[:, None] * centred - residuals).sum(axis=1)
    best = int(np.where(scales > 0, errors, np.inf).argmin())
    if scales[best] <= 0:
        raise ValueError("dense losses do not fall with FLOPs")
    scale = float(scales[best])
    return Line(float(losses.mean() - scale * falls[best].mean()), scale, float(POWERS[best]), low, float(flops.max()))


def nearest(dense: Mapping[float, Losses], flops: float) -> dict[float, Losses]:
    """The budgets whose FLOPs are nearest, by ratio."""
    chosen = sorted(dense, key=lambda budget: abs(math.log(budget / flops)))[:LEAST_BUDGETS]
    return {budget: dense[budget] for budget in sorted(chosen)}


@dataclass(frozen=True)
class Saving:
    """Share of the FLOPs saved at equal loss; negative where the arm costs more.

    Args:
        interval: 95%, by bootstrap over seeds; None for one seed.
        extrapolated: the loss lies beyond the dense budgets.
    """

    share: float
    interval: tuple[float, float] | None
    seeds: int
    extrapolated: bool

    def text(self) -> str:
        interval = "one seed" if self.interval is None else f"{self.interval[0]:+.0%} to {self.interval[1]:+.0%}"
        return f"{self.share:+.0%} ({interval}{', extrapolated' if self.extrapolated else ''})"


def saving(losses: Losses, flops: float, dense: Mapping[float, Losses], draws: int = DRAWS) -> Saving:
    """Compare an arm with the dense runs.

    The dense runs are those of the arm's seeds, so that what a seed does to all arms alike cancels; a budget without
    any of them takes part with all it has. A draw of the bootstrap takes as many seeds as the arm has, with
    replacement, and refits the curve. Two seeds give a rough interval and one gives none.

    Args:
        flops: of the arm.
        dense: losses by FLOPs.
    """
    near, loss, seeds = nearest(dense, flops), _mean(losses, None), sorted(losses)
    ends = [_mean(found, seeds) for found in dense.values()]
    interval = None
    if len(seeds) > 1:
        generator = random.Random(0)
        found = []
        for _ in range(draws):
            drawn = generator.choices(seeds, k=len(seeds))
            found.append(_share(fit(_points(near, drawn)), _mean(losses, drawn), flops))
        interval = (float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975)))
    return Saving(_share(fit(_points(near, seeds)), loss, flops), interval, len(seeds),
                  not min(ends) <= loss <= max(ends))


def _share(line: Line, loss: float, flops: float) -> float:
    return 1.0 - flops / line.flops(loss)


def _points(dense: Mapping[float, Losses], drawn: Sequence[int] | None) -> list[tuple[float, float]]:
    return [(flops, _mean(losses, drawn)) for flops, losses in dense.items()]


def _mean(losses: Losses, drawn: Sequence[int] | None) -> float:
    """Mean over the drawn seeds that there are; over all without a draw, or where it has none of them."""
    chosen = [losses[seed] for seed in drawn or () if seed in losses]
    return math.fsum(chosen or losses.values()) / len(chosen or losses)
