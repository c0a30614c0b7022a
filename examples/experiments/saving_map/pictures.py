"""The pictures of the map: final losses against FLOPs with the dense curve, and savings against tokens a parameter."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from examples.experiments.saving_map.arms import METHODS, SIZES
from examples.experiments.saving_map.line import Losses, Saving, fit, nearest
from tools.comparison.figures import BASELINE_COLOUR, COLOURS, GREY, MARKERS, STYLE

if TYPE_CHECKING:
    from examples.experiments.saving_map.report import Point


LOWEST = -60.0
"""Savings below this, in percent, lie outside the picture; the table has them."""


Look = tuple[str, str]
"""Colour and marker."""


def _looks(arms: Iterable[str]) -> dict[str, Look]:
    """A look for each arm that is shown, in the order of all arms; black is dense AdamW's."""
    shown = {*arms} - {"dense"}
    others = [arm for arm in METHODS if arm in shown]
    return {"dense": (BASELINE_COLOUR, MARKERS[0])} | {
        arm: (COLOURS[number % len(COLOURS)], MARKERS[1 + (number + number // len(COLOURS)) % (len(MARKERS) - 1)])
        for number, arm in enumerate(others)}


_FILLS = {"small": "full", "flat": "bottom", "deep": "top", "larger": "none"}
_FILL_WORDS = {"full": "filled", "bottom": "lower half filled", "top": "upper half filled", "none": "hollow"}


def _fills(sizes: Collection[str]) -> dict[str, str]:
    """How the markers of each model are filled."""
    return {name: _FILLS.get(name, "full") for name in SIZES if name in sizes}


def _legend(figure: Figure, sizes: Collection[str]) -> None:
    """Beside the panels, with a line for each arm."""
    handles = {label: handle for axes in figure.axes
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    titles = [METHODS[arm].title for arm in METHODS]
    shown = sorted(handles, key=titles.index)
    fills = _fills(sizes)
    title = ", ".join(f"{name}: {_FILL_WORDS[fill]}" for name, fill in fills.items()) if len(fills) > 1 else None
    figure.legend([handles[label] for label in shown], shown, title=title, frameon=False, fontsize=8,
                  title_fontsize=8, loc="outside right upper")


def losses(points: Sequence["Point"], curves: Mapping[str, Mapping[float, Losses]], path: Path) -> None:
    """Final loss of every arm at its best rate, against FLOPs; runs of an arm are joined by size."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(11.0, 5.4), constrained_layout=True)
        for dense in curves.values():
            means = {flops: {0: float(np.mean(list(found.values())))} for flops, found in dense.items()}
            grid = np.geomspace(min(means), max(means), 200)
            curve = [fit([(near, found[0]) for near, found in nearest(means, flops).items()]).loss(flops)
                     for flops in grid]
            axes.plot(grid, curve, color=GREY, linewidth=1.0, zorder=1)
        looks, sizes = _looks(point.arm for point in points), {point.size for point in points}
        fills = _fills(sizes)
        for size, arm in dict.fromkeys((point.size, point.arm) for point in points):
            chosen = [point for point in points if (point.size, point.arm) == (size, arm)]
            colour, marker = looks[arm]
            axes.plot([point.flops for point in chosen], [point.loss for point in chosen], color=colour, marker=marker,
                      fillstyle=fills[size], linestyle="none" if arm == "dense" else ":",
                      label=METHODS[arm].title)
        axes.set(xscale="log", xlabel="FLOPs (forward, backward, and Muon's iterations)",
                 ylabel="held-out loss, nats a token")
        _legend(figure, sizes)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def saved(found: Mapping[str, Mapping[tuple[str, float, str], Saving]], path: Path) -> None:
    """FLOPs saved at equal loss against tokens a parameter, one panel for each dense baseline; beside dense Muon stand
    the arms with Muon alone."""
    shown = {baseline: {key: one for key, one in savings.items() if baseline == "dense" or key[2].startswith(baseline)}
             for baseline, savings in found.items()}
    shown = {baseline: savings for baseline, savings in shown.items() if savings}
    if not shown:
        return
    keys = [key for savings in shown.values() for key in savings]
    looks, sizes = _looks(arm for _, _, arm in keys), {size for size, _, _ in keys}
    fills = _fills(sizes)
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(shown), figsize=(4.4 * len(shown) + 4.2, 4.6), sharey=True,
                                         squeeze=False, constrained_layout=True)
        for axes, (baseline, savings) in zip(panels[0], shown.items(), strict=True):
            for size, arm in dict.fromkeys((size, arm) for size, _, arm in savings):
                lengths = sorted(tokens for of, tokens, name in savings if (of, name) == (size, arm))
                colour, marker = looks[arm]
                shares = [100 * savings[size, tokens, arm].share for tokens in lengths]
                axes.plot(lengths, shares, color=colour, marker=marker, label=METHODS[arm].title,
                          fillstyle=fills[size])
                for tokens, share in zip(lengths, shares, strict=True):
                    if (interval := savings[size, tokens, arm].interval) is not None:
                        axes.vlines(tokens, 100 * interval[0], 100 * interval[1], color=colour, linewidth=1.2)
                    if savings[size, tokens, arm].extrapolated:
                        axes.annotate("extrapolated", (tokens, share), textcoords="offset points", xytext=(6, -3),
                                      fontsize=7.5, color=GREY)
            axes.axhline(0.0, color=GREY, linewidth=0.8)
            axes.set(xscale="log", xlabel="tokens a parameter", title=f"against {METHODS[baseline].title}")
            ticks = sorted({tokens for _, tokens, _ in savings})
            axes.set_xticks(ticks, [f"{tokens:g}" for tokens in ticks])
            axes.minorticks_off()
        _legend(figure, sizes)
        panels[0][0].set_ylim(bottom=max(LOWEST, panels[0][0].get_ylim()[0]))
        panels[0][0].set_ylabel("FLOPs saved at equal loss, %")
        figure.savefig(path, dpi=160)
        pyplot.close(figure)
