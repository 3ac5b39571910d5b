"""Tables and text for people: fitted to a terminal, drawn by rich there, plain everywhere else; CSV and JSON beside."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Columns = Sequence[Sequence[str]]  # the name of each, then its cells


def printable(text: str) -> str:
    """The text on one line: escapes for what moves the cursor, colours a terminal or is no character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_text(text: str) -> None:
    """Prints lines of text, which a terminal that is narrower breaks between words alone."""
    lines = text.split("\n")
    if sys.stdout.isatty():
        width = _terminal_width()
        lines = [textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines]
    print("\n".join(lines))


def print_named(name: str, text: str, colour: str) -> None:
    """Prints a name and what it stands for on a line; the name has the colour, #rrggbb, where there is colour."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(printable(f"{name}  {text}"))
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text.assemble((name, f"bold {colour}"), printable(f"  {text}")), soft_wrap=True)


def print_csv(records: Sequence[Mapping[str, Any]]) -> None:
    """Prints records with the same names as CSV (RFC 4180): the names, then a line each; None is an empty field."""
    writer = csv.DictWriter(sys.stdout, list(records[0]))
    writer.writeheader()
    writer.writerows(records)


def print_json(record: Any) -> None:
    """Prints a record as JSON, a name or a number a line."""
    print(json.dumps(record, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, marked: Sequence[bool] | None = None) -> None:
    """Prints a table: its first column and those without a name to the left, all others to the right.

    Columns of empty cells are left out. A table wider than the terminal becomes several, each with the first column.

    Args:
        header: a name for each column.
        rows: a cell for each column.
        marked: which rows to colour, where there is colour; their text has to say it as well.
    """
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    if not columns:
        return
    if not sys.stdout.isatty():
        _print_plain(columns)
        return
    rich = importlib.util.find_spec("rich") is not None
    for number, part in enumerate(_parts(columns, _terminal_width(), rich)):
        if number:
            print()
        if rich:
            _print_with_rich(part, marked or [False] * len(rows))
        else:
            _print_plain(part)


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns


def _parts(columns: Columns, width: int, rich: bool) -> Iterator[Columns]:
    """The columns, the first one with as many of the others as fit beside it each time."""
    widths = list(map(_narrowest if rich else _widest, columns))
    gap = 1 if rich else 2
    part, taken = [columns[0]], widths[0]
    for column, needed in zip(columns[1:], widths[1:], strict=True):
        if len(part) > 1 and taken + gap + needed > width:
            yield part
            part, taken = [columns[0]], widths[0]
        part.append(column)
        taken += gap + needed
    yield part


def _widest(column: Sequence[str]) -> int:
    return max(map(len, column))


def _narrowest(column: Sequence[str]) -> int:
    """The width with the header's words below each other; cells never break."""
    name, *cells = column
    return max(map(len, (*name.split(" "), *cells)))


def _print_plain(columns: Columns) -> None:
    formats = [
        f"{'<' if left else '>'}{_widest(column)}" for column, left in zip(columns, _to_the_left(columns), strict=True)
    ]
    for cells in zip(*columns, strict=True):
        print("  ".join(map(format, cells, formats)).rstrip())


def _to_the_left(columns: Columns) -> list[bool]:
    return [number == 0 or not column[0] for number, column in enumerate(columns)]


def _print_with_rich(columns: Columns, marked: Sequence[bool]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=_terminal_width())
    widths = list(map(_widest, columns))
    if sum(widths) + len(widths) - 1 > console.width:
        widths = list(map(_narrowest, columns))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for (name, *_), left, width in zip(columns, _to_the_left(columns), widths, strict=True):
        table.add_column(Text(name), justify="left" if left else "right", width=width)
    for cells, mark in zip(zip(*(column[1:] for column in columns), strict=True), marked, strict=True):
        table.add_row(*map(Text, cells), style="yellow" if mark else None)
    console.print(table)
