"""Pictures of a comparison: validation loss against what was consumed, and final losses against FLOPs.

Arms are named in the margin beside their lines rather than in a legend, in the order of their ends, and differ in
colour, dash and marker, so that no two need colours to be told apart.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ltd.errors import ConfigError
from tools.comparison.arms import Arm
from tools.comparison.curves import COSTS, Point
from tools.comparison.seed_statistics import ArmSummary, Comparison, Estimate, estimate
from tools.comparison.tables import estimate_text

BASELINE_COLOUR = "#1f2328"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5489a", "#e08e00", "#2a9fd8", "#7a1f3d", "#6a51c9", "#7d7a12", "#8a5a3c")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.6, 1.3)))
MARKERS = "osD^vPX<>hp"
INK, GREY = "#1f2328", "#57606a"
AXES = {"raw_tokens": "raw tokens (read)", "layer_tokens": "layer tokens (processed by a layer, mean over layers)",
        "flops": "FLOPs (forward and backward, as computed after dropping)",
        "hours": "hours of training steps, as logged"}
MISSING = "Pictures need matplotlib, which is not installed: pip install 'megatron_ltd[plot]'."
STYLE = {
    "font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8b949e",
    "axes.labelcolor": "#30363d", "xtick.color": GREY, "ytick.color": GREY, "axes.grid": True,
    "grid.color": "#e6e9ed", "grid.linewidth": 0.8, "axes.axisbelow": True,
}
LABEL_HEIGHT = 0.062
"""Of a name in the margin, in heights of the axes."""
LONGEST_NAME = 36
"""Letters of a name in the margin."""


@dataclass(frozen=True)
class Look:
    """How an arm is drawn."""

    colour: str
    dash: Any
    marker: str
    width: float


@dataclass(frozen=True)
class Label:
    """A name in the margin, and the point that it names."""

    text: str
    look: Look
    x: float
    y: float


def draw(arms: list[Arm], comparison: Comparison, title: str, folder: Path) -> list[tuple[Path, str]]:
    """Write all pictures; the files, each with a text that says what it shows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    matplotlib.use("Agg")
    shown = [(arm, look) for arm, look in zip(arms, looks(arms, comparison.baseline), strict=True) if arm.finite]
    if not shown:
        return []
    finals = {row.name: row.loss for row in comparison.summaries if row.loss is not None}
    written = []
    for cost, name in COSTS.items():
        path, text = folder / f"loss_{cost}.png", f"Validation loss against {name}"
        with _panel(path, title, text, AXES[cost]) as axes:
            _draw_curves(axes, shown, cost, finals)
        written.append((path, text))
    path, text = folder / "final_loss_flops.png", "Final validation loss against FLOPs"
    with _panel(path, title, text, AXES["flops"]) as axes:
        _draw_finals(axes, shown, comparison)
    return [*written, (path, text)]


def looks(arms: list[Arm], baseline: str) -> list[Look]:
    """A look for each arm, the same in all pictures; the baseline is black and heavier."""
    found, others = [], 0
    for arm in arms:
        if arm.name == baseline:
            found.append(Look(BASELINE_COLOUR, "-", MARKERS[0], 2.6))
            continue
        found.append(Look(COLOURS[others % len(COLOURS)], DASHES[others % len(DASHES)],
                          MARKERS[1 + others % (len(MARKERS) - 1)], 1.8))
        others += 1
    return found


@contextmanager
def _panel(path: Path, title: str, text: str, axis: str) -> Iterator[Any]:
    """Axes with a margin for names, which are written to `path` at the end."""
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(10.4, 5.9))
        axes = figure.add_axes((0.075, 0.135, 0.605, 0.735))
        axes.set_ylabel("validation loss (nats)")
        axes.set_xlabel(axis)
        axes.ticklabel_format(axis="x", useMathText=True)
        if "tokens" in axis:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.text(0.012, 0.955, text, fontsize=13.5, fontweight="bold", color=INK)
        figure.text(0.012, 0.912, title, fontsize=10.5, color=GREY)
        yield axes
        try:
            figure.savefig(path, dpi=160)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}. Choose another --output.") from error
        finally:
            pyplot.close(figure)


def curve_of(arm: Arm, cost: str) -> list[tuple[float, Estimate]]:
    """Mean cost, and loss over seeds, at the validations that all runs have and in which all losses are finite."""
    by_step: dict[int, list[Point]] = {}
    for run in arm.finite:
        for point in run.curve.points:
            by_step.setdefault(point.step, []).append(point)
    curve = []
    for _, points in sorted(by_step.items()):
        if len(points) == len(arm.finite) and all(math.isfinite(point.loss) for point in points):
            curve.append((estimate([point.costs[cost] for point in points]).mean,
                          estimate([point.loss for point in points])))
    return curve


def _draw_curves(axes: Any, shown: list[tuple[Arm, Look]], cost: str, finals: dict[str, Estimate]) -> None:
    labels, heights = [], []
    for arm, look in shown:
        curve = curve_of(arm, cost)
        if not curve:
            continue
        at, loss = [x for x, _ in curve], [y.mean for _, y in curve]
        error = [y.standard_error or 0.0 for _, y in curve]
        axes.fill_between(at, [y - e for y, e in zip(loss, error, strict=True)],
                          [y + e for y, e in zip(loss, error, strict=True)], color=look.colour, alpha=0.16, linewidth=0)
        axes.plot(at, loss, linestyle=look.dash, color=look.colour, linewidth=look.width)
        axes.plot(at[-1:], loss[-1:], look.marker, color=look.colour, markersize=7.5, markeredgecolor="white", zorder=4)
        labels.append(Label(_label(arm, finals[arm.name]), look, at[-1], loss[-1]))
        heights.append(loss)
    axes.set_xlim(0, 1.02 * max(label.x for label in labels))
    axes.set_ylim(loss_limits(heights))
    _name(axes, labels)
    cut = "; early losses: above the picture" if max(map(max, heights)) > axes.get_ylim()[1] else ""
    _legend(axes, f"line: mean of the seeds; band: ± standard error{cut}")


def loss_limits(curves: list[list[float]]) -> tuple[float, float]:
    """A range that shows where arms differ: of the first fifth of the curves the top is left out."""
    ends = [curve[-1] for curve in curves]
    low, high, top = min(min(curve) for curve in curves), max(ends), max(max(curve) for curve in curves)
    height = max(2.5 * (high - low), max(curve[len(curve) // 5] for curve in curves) - low) or 0.1
    return low - 0.06 * height, min(low + height, top) + 0.04 * height


def _draw_finals(axes: Any, shown: list[tuple[Arm, Look]], comparison: Comparison) -> None:
    rows: dict[str, ArmSummary] = {row.name: row for row in comparison.summaries}
    labels, ends = [], []
    for arm, look in shown:
        row = rows[arm.name]
        if row.loss is None:
            continue
        x, error = row.costs["flops"].mean, row.loss.standard_error or 0.0
        axes.errorbar([x], [row.loss.mean], yerr=[error] if error else None, fmt=look.marker, color=look.colour,
                      markersize=9, markeredgecolor="white", capsize=4, elinewidth=1.6, zorder=4)
        labels.append(Label(_label(arm, row.loss), look, x, row.loss.mean))
        ends += [row.loss.mean - error, row.loss.mean + error]
    if comparison.target is not None:
        axes.axhline(comparison.target, color=BASELINE_COLOUR, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.6)
    least, most = min(label.x for label in labels), max(label.x for label in labels)
    room = 0.08 * (most - least) or 0.1 * most or 1.0
    axes.set_xlim(least - room, most + room)
    height = max(ends) - min(ends) or 0.1
    axes.set_ylim(min(ends) - 0.08 * height, max(ends) + 0.08 * height)
    _name(axes, labels)
    _legend(axes, "bars: ± standard error over seeds; dashed: the baseline")


def _legend(axes: Any, text: str) -> None:
    axes.figure.text(0.988, 0.014, text, fontsize=9, color=GREY, ha="right")


def _label(arm: Arm, loss: Estimate) -> str:
    name = arm.name if len(arm.name) <= LONGEST_NAME else f"{arm.name[:LONGEST_NAME - 1]}…"
    lost = len(arm.runs) - len(arm.finite)
    return f"{name}  {estimate_text(loss, 3)}" + (f" ({lost} diverged)" if lost else "")


def _name(axes: Any, labels: list[Label]) -> None:
    """Names in the right margin, level with what they name where there is room; the axes take what is left."""
    from matplotlib.lines import Line2D
    renderer = axes.figure.canvas.get_renderer()
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label.y)
    heights = spread([(label.y - low) / (high - low) for label in labels], min(LABEL_HEIGHT, 1.0 / len(labels)))
    texts = [axes.text(0, height, label.text, transform=axes.transAxes, va="center", fontsize=9.6, color=INK,
                       parse_math=False) for label, height in zip(labels, heights, strict=True)]
    widest = max(text.get_window_extent(renderer).width for text in texts) / axes.figure.bbox.width
    left, bottom, _, top = axes.get_position().extents
    width = 1.0 - left - widest - 0.078
    axes.set_position((left, bottom, width, top - bottom))
    begin, middle, end, text_begin = (1.0 + part / width for part in (0.018, 0.036, 0.054, 0.063))
    for label, height, text in zip(labels, heights, texts, strict=True):
        look = label.look
        axes.annotate("", xy=(label.x, label.y), xycoords="data", xytext=(begin, height), textcoords="axes fraction",
                      arrowprops={"arrowstyle": "-", "color": look.colour, "linewidth": 0.8, "alpha": 0.55,
                                  "linestyle": ":", "shrinkA": 0, "shrinkB": 4}, annotation_clip=False)
        sample = {"transform": axes.transAxes, "color": look.colour, "clip_on": False}
        axes.add_line(Line2D([begin, end], [height, height], linestyle=look.dash, linewidth=look.width, **sample))
        axes.add_line(Line2D([middle], [height], marker=look.marker, markersize=7.5, markeredgecolor="white", **sample))
        text.set_x(text_begin)


def spread(wanted: list[float], gap: float) -> list[float]:
    """Places in [0, 1] at least `gap` apart, as near to the wanted ones as can be; those must be in order.

    Minus `gap` times its rank a place need only not fall, so this is isotonic regression, by pooling neighbours.
    """
    pools: list[tuple[float, int]] = []
    for rank, place in enumerate(wanted):
        mean, count = place - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (mean * count + before * size) / (count + size), count + size
        pools.append((mean, count))
    highest = max(0.0, 1.0 - gap * (len(wanted) - 1))
    flat = [min(max(mean, 0.0), highest) for mean, count in pools for _ in range(count)]
    return [place + rank * gap for rank, place in enumerate(flat)]
