"""A picture of a run: what each layer processes, layer by step; tokens, FLOPs and learning rate below it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ltd.errors import ConfigError
from megatron_ltd.plan.derived import policies
from tools.drop_course.course import Course

COLUMNS, STEPS_OF_A_COLUMN, SINGLE_STEPS, POINTS = 120, 64, 60, 300
SKIPPED = "#f3eee2"
FULL = ((0.0, SKIPPED), (0.01, "#d9e7f5"), (0.5, "#6aa5d8"), (1.0, "#0d4379"))
FORWARD_ONLY = ((0.0, SKIPPED), (0.01, "#fbe0ea"), (0.5, "#eb8fb2"), (1.0, "#cf2f6d"))
GREY, BLUE, GREEN, INK = "#8b95a1", "#0d4379", "#2a8c5a", "#28323d"
STYLE = {"font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK,
         "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
         "axes.titlelocation": "left", "lines.linewidth": 1.8}


def shares(course: Course, edges: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the tokens of a sample that each layer processes, forward, and of these also backward.

    Args:
        edges: steps between which the shares are averaged; of many steps only some, evenly spaced.

    Shapes:
        -> [layers, spans], [layers, spans]
    """
    found, tokens = policies(course.config), course.config.model.seq_length
    forward, backward = (np.zeros((course.layers, len(edges) - 1)) for _ in range(2))
    for column, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
        steps = range(first, end, max(1, (end - first) // STEPS_OF_A_COLUMN))
        for step in steps:
            for number, layer in enumerate(found.plan(step).layers):
                forward[number, column] += layer.processed_tokens / tokens / len(steps)
                backward[number, column] += layer.backward * layer.processed_tokens / tokens / len(steps)
    return forward, backward


def draw(course: Course, path: Path) -> None:
    """Write the picture.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("Plots need matplotlib, which is not installed: pip install matplotlib.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = min(COLUMNS, course.steps)
    whole = [course.steps * column // count for column in range(count + 1)]
    drawn = policies(course.config).is_drawn and count < course.steps
    heights = [3.0, *([1.8] if drawn else []), 1.9]
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(10.0, sum(heights) + 1.4), layout="constrained")
        rows = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0.06)
        _layers(figure.add_subplot(rows[0]), course, whole, "means over the steps of a column" * drawn, key=True)
        if drawn:
            # After a quarter of the run: some schedules draw nothing at the first step, others nothing at the last.
            start = min(course.steps // 4, course.steps - SINGLE_STEPS)
            _layers(figure.add_subplot(rows[1]), course, list(range(start, start + SINGLE_STEPS + 1)),
                    f"{SINGLE_STEPS} single steps", key=False)
        panels = rows[-1].subgridspec(1, 2 if course.config.optimizer.lr is None else 3)
        _lines([figure.add_subplot(panel) for panel in panels], course)
        saved = f"{course.before[-1].saving:.1%} of the FLOPs saved"
        figure.suptitle(f"{asked_for(course)}\n{course.layers} layers, {course.steps:,} steps, {saved}", x=0.012,
                        ha="left", fontsize=12)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def asked_for(course: Course) -> str:
    """The settings that enable the policies."""
    settings = course.config.token_drop
    return ", ".join(policy.asked_for(settings) for policy in policies(course.config).active) or "no policy"


def _layers(axes: Any, course: Course, edges: list[int], what: str, *, key: bool) -> None:
    """Layer by step.

    Args:
        key: explain the colours.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    forward, backward = shares(course, edges)
    full, half = (LinearSegmentedColormap.from_list("share", colours, N=1024) for colours in (FULL, FORWARD_ONLY))
    both = np.divide(backward, forward, out=np.ones_like(forward), where=forward > 0.0)[:, :, None]
    axes.pcolormesh(edges, np.arange(course.layers + 1) - 0.5, both * full(forward) + (1.0 - both) * half(forward),
                    linewidth=0, rasterized=True)
    axes.set_title("layer by step" + (f": {what}" if what else ""))
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(edges[0], edges[-1])
    axes.spines[["left", "bottom"]].set_visible(False)
    if key:
        names = {"all tokens": full(1.0), "half": full(0.5), "few": full(0.02), "none: skipped": full(0.0)}
        names |= {"forward pass only": half(1.0)} if (both < 1.0).any() else {}
        axes.legend([Patch(facecolor=colour) for colour in names.values()], list(names), ncols=len(names),
                    loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=1.1, handleheight=1.1,
                    columnspacing=1.4, borderaxespad=0.1)


def _lines(axes: Sequence[Any], course: Course) -> None:
    """Tokens, FLOPs and, if it is known, the learning rate."""
    from matplotlib.ticker import EngFormatter

    steps = sorted({course.steps * number // POINTS for number in range(POINTS + 1)})
    found = [course.after(step) for step in steps]
    tokens, flops, *rate = axes
    tokens.plot(steps, [consumed.tokens for consumed in found], color=GREY, label="read")
    tokens.plot(steps, [consumed.layer_tokens(course.layers) for consumed in found], color=BLUE, label="layer tokens")
    flops.plot(steps, [consumed.full_flops for consumed in found], color=GREY, label="without dropping")
    flops.plot(steps, [consumed.flops for consumed in found], color=BLUE, label="with it")
    for panel in (tokens, flops):
        panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        panel.legend(frameon=False, loc="upper left")
    for panel in rate:
        rows = list(course.rows(POINTS))
        panel.plot([row.step for row in rows], [row.learning_rate for row in rows], color=GREEN)
        panel.ticklabel_format(axis="y", scilimits=(-2, 2), useMathText=True)
    for panel, title in zip(axes, ("tokens", "FLOPs", "learning rate"), strict=False):
        panel.set_title(title, loc="center" if title == "learning rate" else "left")
        panel.set_xlabel("step")
        panel.set_xlim(0, course.steps)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
