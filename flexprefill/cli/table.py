"""Tables for people: drawn by rich in a terminal, plain aligned text everywhere else."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def printable(text: str) -> str:
    """The text on one line: escapes for what moves the cursor, colours a terminal or is no character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, marked: Sequence[bool] | None = None) -> None:
    """Prints a table, the first column to the left and all others to the right; columns of empty cells are left out.

    Args:
        header: a name for each column.
        rows: a cell for each column.
        marked: which rows to colour, where there is colour; their text has to say it as well.
    """
    filled = [index for index, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    header, *rows = ([cells[index] for index in filled] for cells in (header, *rows))
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_with_rich(header, rows, marked or [False] * len(rows))
    else:
        _print_plain(header, rows)


def _print_plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, *rows):
        aligned = [f"{cells[0]:<{widths[0]}}"]
        aligned += [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print("  ".join(aligned).rstrip())


def _print_with_rich(header: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if sum(widths) + len(widths) > console.width:
        # headers may break between words; cells never do
        widths = [max(map(len, (*name.split(" "), *cells))) for name, *cells in columns]
    if sum(widths) + len(widths) > console.width:
        _print_plain(header, rows)
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for index, (name, width) in enumerate(zip(header, widths, strict=True)):
        table.add_column(Text(name), justify="right" if index else "left", width=width)
    for cells, mark in zip(rows, marked, strict=True):
        table.add_row(*map(Text, cells), style="yellow" if mark else None)
    console.print(table)
