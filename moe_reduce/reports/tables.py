"""Format rows of cells as aligned text for a terminal, or as a Markdown table for a document."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]  # the first row names the columns; all rows are equally long


def aligned(rows: Rows) -> str:
    """Lines whose first column is aligned to the left and whose other columns are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def markdown(rows: Rows) -> str:
    """A Markdown table, ending with a newline."""
    names, *others = rows
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (names, ["---"] * len(names), *others))


def transposed(columns: Rows) -> list[list[str]]:
    """Rows of a table that is given by its columns."""
    return [list(row) for row in zip(*columns, strict=True)]
