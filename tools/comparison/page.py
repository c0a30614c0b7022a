"""One page with all tables and pictures, which needs no other file and no network."""

import base64
from html import escape
from pathlib import Path

from tools.comparison.seed_statistics import Comparison
from tools.comparison.tables import Table, tables

STYLE = """
body { margin: 2.5rem auto; max-width: 74rem; padding: 0 1.5rem; background: #fff; color: #1f2328;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #d8dee4; }
th { font-weight: 600; } thead th { border-bottom: 2px solid #57606a; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; }
tr.baseline { background: #f3f5f7; }
figure { margin: 2.2rem 0; } img { display: block; max-width: 100%; height: auto; }
.notes { max-width: 52rem; color: #424a53; font-size: .92rem; } .notes li { margin: .3rem 0; }
"""


def page(comparison: Comparison, title: str, pictures: list[tuple[Path, str]], without: str | None) -> str:
    """The page.

    Args:
        pictures: PNG files, each with a text that says what it shows.
        without: why there are no pictures.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    body += [_table(table, comparison.baseline) for table in tables(comparison)]
    body.append('<h2>How to read this</h2>\n<ul class="notes">'
                + "".join(f"<li>{escape(note)}</li>" for note in comparison.notes) + "</ul>")
    body += [_picture(path, text) for path, text in pictures]
    if without is not None:
        body.append(f"<p>{escape(without)}</p>")
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(body) + "\n</body>\n</html>\n")


def _table(table: Table, baseline: str) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.headers)
    rows = []
    for name, *cells in table.rows:
        kind = ' class="baseline"' if name == baseline else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(name)}</th>'
                    + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>'
            + "\n".join(rows) + "</tbody></table></div>")


def _picture(path: Path, text: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img src="data:image/png;base64,{content}" alt="{escape(text)}"></figure>'
