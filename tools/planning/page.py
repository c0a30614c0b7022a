"""A plan as one page with tables and pictures, in the style of a comparison of runs."""

import io
from collections.abc import Mapping
from html import escape

from tools.pages.report_page import document, html_picture, html_table
from tools.planning.answers import Answer

COLOURS = ("#0d4379", "#6aa5d8", "#2a8c5a", "#cf7a2d", "#cf2f6d", "#8b95a1", "#d9b93b")
MISSING = "Pictures need matplotlib: pip install matplotlib."


def page(answer: Answer) -> str:
    body = [html_table(table) for table in answer.tables]
    if answer.problem is not None:
        body.insert(0, f"<p><strong>{escape(answer.problem)}</strong></p>")
    text = "\n".join(answer.lines).strip()
    if text:
        body.append(f"<pre>{escape(text)}</pre>")
    try:
        if answer.bars is not None:
            title, unit, heights = answer.bars
            body.append(html_picture(_bars(title, unit, {name: {unit: value} for name, value in heights.items()}),
                                     title))
        if answer.stacks:
            body.append(html_picture(_bars("Memory of a process", "GB", answer.stacks), "Memory by stage and kind"))
    except ImportError:
        body.append(f"<p>{escape(MISSING)}</p>")
    return document(answer.title, body)


def _bars(title: str, unit: str, rows: Mapping[str, Mapping[str, float]]) -> bytes:
    """Horizontal bars, stacked by kind, as a PNG file."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rows)[::-1]
    figure, axes = pyplot.subplots(figsize=(10.4, 1.2 + 0.34 * len(names)), layout="constrained")
    begin = dict.fromkeys(names, 0.0)
    for colour, kind in zip(COLOURS, next(iter(rows.values())), strict=False):
        axes.barh(names, [rows[name][kind] for name in names], left=[begin[name] for name in names], color=colour,
                  label=kind)
        begin = {name: begin[name] + rows[name][kind] for name in names}
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    if len(next(iter(rows.values()))) > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, format="png")
    pyplot.close(figure)
    return picture.getvalue()
