"""Numbers as the cells of a table, and tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

MISSING = "-"


def signed(nats: float) -> str:
    """Three digits and a sign; a rise that rounds to zero has no minus."""
    return f"{round(nats, 3) + 0.0:+.3f}"


def share(fraction: float) -> str:
    """A fraction of the experts: 1/4, or all."""
    return "all" if fraction == 1.0 else str(Fraction(fraction).limit_denominator(256))


def text_table(headings: Sequence[Sequence[str]], lines: Sequence[Sequence[str]]) -> str:
    """Lay cells out to the right, with a rule below the headings.

    Args:
        headings: for each column its lines, as many for every one.
        lines: of cells, one a column.
    """
    above = [list(line) for line in zip(*headings, strict=True)]
    rows = [*above, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["   ".join(map(str.rjust, cells, widths)).rstrip() for cells in rows]
    text.insert(len(above), "-" * (sum(widths) + 3 * (len(widths) - 1)))
    return "\n".join(text)
