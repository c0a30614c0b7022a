"""The page: what matters of each run, and its curves as drawings in the page, without scripts or other files."""

import math
from dataclasses import dataclass
from html import escape

from tools.pages.report_page import document
from tools.watching.progress import Progress

POINTS = 400
"""Of a curve; longer ones are thinned."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 260, 84, 30, 14

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #57606a; --line: #d8dee4; --paper: #fff;
        --c0: #1f6fb4; --c1: #c2541f; --c2: #2a8c5a; --c3: #8a4fae; --c4: #946c00; --c5: #c23b75; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4ae; --line: #30363d; --paper: #0d1117;
        --c0: #6cb0f0; --c1: #f0925c; --c2: #5fcf95; --c3: #c79be6; --c4: #e0b440; --c5: #f27fb0; } }
body { margin: 1.5rem auto; max-width: 86rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
       font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .6rem; } h2 { font-size: 1rem; margin: 0 0 .3rem; }
.runs, .charts { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); margin-top: 1.4rem; }
section { border-top: 3px solid var(--key, var(--line)); padding-top: .5rem; min-width: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: 0;
     font-variant-numeric: tabular-nums; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 16px; }
"""


@dataclass(frozen=True)
class Curve:
    """Points of one run; `dots` draws them singly."""

    colour: int
    points: list[tuple[float, float]]
    dots: bool = False


def page(runs: list[Progress], refresh_seconds: float | None) -> str:
    """The page of the runs side by side.

    Args:
        refresh_seconds: how often the browser reads it again; None for a page that no longer changes.
    """
    title = ", ".join(run.label for run in runs)
    again = "" if refresh_seconds is None else f'<meta http-equiv="refresh" content="{math.ceil(refresh_seconds)}">\n'
    cards = "".join(_card(run, number) for number, run in enumerate(runs))
    charts = "".join(_chart(name, curves) for name, curves in _curves(runs) if any(curve.points for curve in curves))
    return document(title, [f'<div class="runs">{cards}</div>', f'<div class="charts">{charts}</div>'], STYLE, again)


def _card(run: Progress, number: int) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in run.facts())
    return f'<section style="--key: var(--c{number % 6})"><h2>{escape(run.label)}</h2><dl>{facts}</dl></section>'


def _curves(runs: list[Progress]) -> list[tuple[str, list[Curve]]]:
    def of(name: str) -> list[Curve]:
        return [Curve(number, [(line["step"], line[name]) for line in run.steps
                               if isinstance(line.get(name), int | float) and math.isfinite(line[name])])
                for number, run in enumerate(runs)]

    held_out = [Curve(number, [(line["step"], line["validation_loss"]) for line in run.held_out], dots=True)
                for number, run in enumerate(runs)]
    slowest = [Curve(curve.colour, curve.points, dots=True) for curve in of("own_seconds_slowest")]
    return [("loss (dots: validation)", [*of("lm_loss"), *held_out]), ("learning rate", of("learning_rate")),
            ("kept length", of("kept_length")),
            ("seconds a step (dots: the slowest process by itself)", [*of("step_seconds"), *slowest]),
            ("FLOPs saved so far", of("cumulative_saving")), ("gradient norm", of("grad_norm"))]


def _chart(title: str, curves: list[Curve]) -> str:
    points = [point for curve in curves for point in curve.points]
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 8),
                HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP))

    drawn = []
    for curve in curves:
        places = [at(*point) for point in curve.points[::max(1, len(curve.points) // POINTS)]]
        colour = f"var(--c{curve.colour % 6})"
        if curve.dots or len(places) == 1:
            drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        elif places:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    floor = HEIGHT - BOTTOM
    labels = [f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:.3g}</text>'
              for y, value in ((TOP, high), (floor, low))]
    labels += [f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:.0f}</text>'
               for x, value, anchor in ((LEFT, left, "start"), (WIDTH - 8, right, "end"))]
    return (f'<section><h2>{escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)} by step"><path d="M{LEFT} {TOP}V{floor}H{WIDTH - 8}" fill="none" '
            f'stroke="var(--line)"/>{"".join(labels)}{"".join(drawn)}</svg></section>')


def _range(values: list[float]) -> tuple[float, float]:
    """The smallest and the largest, apart from each other."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)
