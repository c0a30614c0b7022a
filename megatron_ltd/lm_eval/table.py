"""Tables for Markdown that also read well as text."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """The rows, of which the first is the head, in columns of equal width.

    Args:
        sides: of each column, "<" for words and ">" for numbers.
    """
    columns = [(side, max(map(len, column))) for side, column in zip(sides, zip(*rows, strict=True), strict=True)]
    lines = ["| " + " | ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)) + " |"
             for row in rows]
    rule = "|".join("-" * (width + 1) + ("-" if side == "<" else ":") for side, width in columns)
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def number(value: float | None, sign: str = "") -> str:
    """A number in four decimal places; "-" for none.

    Args:
        sign: "+" to show that of positive numbers.
    """
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.4e}"
