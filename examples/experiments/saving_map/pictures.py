"""The pictures of the map: final losses against FLOPs, and savings against tokens per parameter."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

from examples.experiments.saving_map.arms import METHODS, SIZES
from examples.experiments.saving_map.line import Losses, Saving, fit, nearest
from examples.experiments.saving_map.points import Point
from tools.comparison.figures import BASELINE_COLOUR, COLOURS, GREY, MARKERS, STYLE

LOWEST = -60.0
"""Savings below this, in percent, lie outside the picture; the table has them."""
FOLLOWED = 3
"""Lengths from which on an arm's losses are a line of its own; the others are grey points."""
Look = tuple[str, str]
"""Colour and marker."""
SavingKey = tuple[str, float, str]
"""Size, tokens per parameter, arm."""
FAINT: dict[str, Any] = {"color": GREY, "marker": "o", "markersize": 3.5, "alpha": 0.6, "linestyle": "none"}
LINES = {"small": "-", "flat": ":", "deep": "-.", "larger": "--"}


def _looks(arms: Collection[str]) -> dict[str, Look]:
    """A look for each arm, the same with either optimizer; black is dense training."""
    looks = {"dense": (BASELINE_COLOUR, MARKERS[0]), "muon": (GREY, MARKERS[0])}
    methods = dict.fromkeys(arm.removeprefix("muon_") for arm in METHODS if arm in arms and arm not in looks)
    for number, method in enumerate(methods):
        look = (COLOURS[number % len(COLOURS)], MARKERS[1 + number % (len(MARKERS) - 1)])
        looks |= {method: look, f"muon_{method}": look}
    return looks


def _words(size: str) -> str:
    model = SIZES[size].budget.config((), 1).model
    return f"{SIZES[size].budget.parameters / 1e6:.2f} million parameters, {model.num_layers} layers"


def losses(points: Sequence[Point], curves: Mapping[str, Mapping[float, Losses]], path: Path) -> None:
    """Final loss of every arm at its best rate against FLOPs, a panel for each model on which arms were compared."""
    lengths = Counter((point.size, point.arm) for point in points)
    arms = Counter(size for size, _ in lengths)
    sizes = [size for size in SIZES if arms[size] > 2] or [size for size in SIZES if arms[size]]
    looks = _looks({arm for (size, arm), count in lengths.items() if size in sizes and count >= FOLLOWED})
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(sizes), figsize=(6.4 * len(sizes), 6.6), squeeze=False,
                                         constrained_layout=True)
        for axes, size in zip(panels[0], sizes, strict=True):
            of_size = [point for point in points if point.size == size]
            if size in curves:
                axes.plot(*_dense_curve(curves[size]), color=BASELINE_COLOUR, linewidth=1.0, zorder=1)
            rare = [point for point in of_size if lengths[size, point.arm] < FOLLOWED]
            _loss_lines(axes, [point for point in of_size if point not in rare], looks)
            axes.plot([point.flops for point in rare], [point.loss for point in rare], **FAINT,
                      label="others, at one or two lengths" if rare else None)
            axes.set(xscale="log", title=_words(size), xlabel="FLOPs (forward, backward, and Muon's iterations)",
                     ylabel="held-out loss, nats a token")
            _legend(axes)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.12))


def _loss_lines(axes: Any, points: Sequence[Point], looks: Mapping[str, Look]) -> None:
    for arm in METHODS:
        chosen = [point for point in points if point.arm == arm]
        if chosen:
            colour, marker = looks[arm]
            axes.plot([point.flops for point in chosen], [point.loss for point in chosen], color=colour, marker=marker,
                      markersize=5.5, linewidth=1.2, linestyle="none" if arm == "dense" else "-",
                      label=METHODS[arm].title)


def _dense_curve(dense: Mapping[float, Losses]) -> tuple[list[float], list[float]]:
    means = {flops: {0: float(np.mean(list(found.values())))} for flops, found in dense.items()}
    grid = [float(flops) for flops in np.geomspace(min(means), max(means), 200)]
    return grid, [fit([(near, found[0]) for near, found in nearest(means, flops).items()]).loss(flops)
                  for flops in grid]


def saved(found: Mapping[str, Mapping[SavingKey, Saving]], path: Path) -> None:
    """FLOPs saved at equal loss against tokens per parameter, a panel for each dense baseline: beside dense AdamW stand
    the arms with AdamW, and dense Muon; beside dense Muon those with Muon. Arms of one length are grey points."""
    shown = {baseline: {key: one for key, one in savings.items()
                        if key[2].startswith("muon_") == (baseline == "muon")} for baseline, savings in found.items()}
    shown = {baseline: savings for baseline, savings in shown.items() if savings}
    if not shown:
        return
    lengths = Counter((size, arm) for savings in shown.values() for size, _, arm in savings)
    looks = _looks({arm for (_, arm), count in lengths.items() if count > 1})
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(shown), figsize=(6.4 * len(shown), 6.2), sharey=True,
                                         squeeze=False, constrained_layout=True)
        for axes, (baseline, savings) in zip(panels[0], shown.items(), strict=True):
            for size in SIZES:
                for arm in METHODS:
                    of_arm = {tokens: one for (of, tokens, name), one in savings.items() if (of, name) == (size, arm)}
                    if len(of_arm) > 1:
                        _saving_line(axes, f"{METHODS[arm].title} ({size})", LINES.get(size, "-"), looks[arm], of_arm)
                    else:
                        axes.plot([*of_arm], [100 * one.share for one in of_arm.values()], **FAINT)
            axes.axhline(0.0, color=GREY, linewidth=0.8)
            axes.set(xscale="log", xlabel="tokens per parameter", title=f"against {METHODS[baseline].title}")
            ticks = sorted({tokens for _, tokens, _ in savings})
            axes.set_xticks(ticks, [f"{tokens:g}" for tokens in ticks])
            axes.minorticks_off()
            _legend(axes)
        panels[0][0].set_ylim(bottom=max(LOWEST, panels[0][0].get_ylim()[0]))
        panels[0][0].set_ylabel("FLOPs saved at equal loss, % (ringed: extrapolated)")
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _saving_line(axes: Any, title: str, line: str, look: Look, savings: Mapping[float, Saving]) -> None:
    """A line with bars for intervals, and rings around what is extrapolated."""
    lengths, (colour, marker) = sorted(savings), look
    shares = [100 * savings[tokens].share for tokens in lengths]
    axes.plot(lengths, shares, color=colour, marker=marker, markersize=5.5, linewidth=1.3, linestyle=line, label=title,
              fillstyle="full" if line == "-" else "none")
    for tokens, share in zip(lengths, shares, strict=True):
        if (interval := savings[tokens].interval) is not None:
            axes.vlines(tokens, 100 * interval[0], 100 * interval[1], color=colour, linewidth=1.2)
        if savings[tokens].extrapolated:
            axes.plot([tokens], [share], "o", color=colour, fillstyle="none", markersize=12, markeredgewidth=0.7)
