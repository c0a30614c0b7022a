"""One page with all tables and pictures of a comparison, which needs no other file and no network."""

from html import escape
from pathlib import Path

from tools.comparison.seed_statistics import Comparison
from tools.comparison.tables import tables
from tools.pages.report_page import document, html_notes, html_picture, html_table


def page(comparison: Comparison, title: str, pictures: list[tuple[Path, str]], without: str | None) -> str:
    """The page.

    Args:
        pictures: PNG files, each with a text that says what it shows.
        without: why there are no pictures.
    """
    body = [html_table(table, comparison.baseline) for table in tables(comparison)]
    body.append(html_notes("How to read this", comparison.notes))
    body += [html_picture(path.read_bytes(), text) for path, text in pictures]
    if without is not None:
        body.append(f"<p>{escape(without)}</p>")
    return document(title, body)
