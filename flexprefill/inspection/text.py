"""Figures as lines of text."""

from __future__ import annotations

from collections.abc import Sequence


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for the header and one for each row, its columns to the right below their names."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(map(str.rjust, cells, widths)) for cells in (header, *rows)]


def head_label(batch: int, head: int, batches: int) -> str:
    """A head's name in a table of these batch entries: where there is one, its number alone."""
    return str(head) if batches == 1 else f"{batch}, {head}"


def head_column(batches: int) -> str:
    """What the column of :func:`head_label` is called."""
    return "head" if batches == 1 else "batch, head"
