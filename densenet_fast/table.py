"""Plain-text tables and the numbers in them."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """``header`` and ``rows`` in aligned columns, as a Markdown table."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def number(value: float | None, digits: int, unit: str = "") -> str:
    """``value`` as the text of a table cell, with ``digits`` decimals; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"
