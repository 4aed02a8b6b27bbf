"""Tables that read well both as Markdown and as text."""

from collections.abc import Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns."""
    columns = [max(len(row[index]) for row in [headings, *rows]) for index in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, columns, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in columns) + "|"
    return "\n".join([line(headings), rule, *map(line, rows)])
