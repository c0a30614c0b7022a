"""Tables of a report as Markdown and as one HTML page, which needs no other file and no network."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
body { margin: 2.5rem auto; max-width: 74rem; padding: 0 1.5rem; background: #fff; color: #1f2328;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #d8dee4; }
th { font-weight: 600; } thead th { border-bottom: 2px solid #57606a; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; }
tr.marked { background: #f3f5f7; }
figure { margin: 2.2rem 0; } img { display: block; max-width: 100%; height: auto; }
.notes { max-width: 52rem; color: #424a53; font-size: .92rem; } .notes li { margin: .3rem 0; }
"""


@dataclass(frozen=True)
class Table:
    """Cells as texts; the first column names the row."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def markdown_table(table: Table) -> str:
    """The first column to the left, numbers to the right."""
    escaped = [tuple(cell.replace("|", "\\|") for cell in row) for row in (table.headers, *table.rows)]
    widths = [max(3, *(len(row[at]) for row in escaped)) for at in range(len(table.headers))]
    lines = ["| " + " | ".join(cell.rjust(width) if at else cell.ljust(width)
                               for at, (cell, width) in enumerate(zip(row, widths, strict=True))) + " |"
             for row in escaped]
    rule = "|" + "|".join("-" * (width + 1) + ":" if at else "-" * (width + 2) for at, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def document(title: str, body: Sequence[str], style: str = STYLE, head: str = "") -> str:
    """A page of these parts.

    Args:
        head: what else its head holds.
    """
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{head}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
            + "\n".join(body) + "\n</body>\n</html>\n")


def html_table(table: Table, marked: str | None = None) -> str:
    """Args:
        marked: name of a row to set off.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.headers)
    rows = []
    for name, *cells in table.rows:
        kind = ' class="marked"' if name == marked else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(name)}</th>'
                    + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>'
            + "\n".join(rows) + "</tbody></table></div>")


def html_notes(title: str, notes: Sequence[str]) -> str:
    return (f'<h2>{escape(title)}</h2>\n<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes)
            + "</ul>")


def html_picture(png: bytes, text: str) -> str:
    """Args:
        text: what the picture shows.
    """
    content = base64.b64encode(png).decode("ascii")
    return f'<figure><img src="data:image/png;base64,{content}" alt="{escape(text)}"></figure>'
