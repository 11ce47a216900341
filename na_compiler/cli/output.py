"""What commands print: tables that fit the terminal, or JSON.

Results go to standard output; progress, warnings and errors to standard error. With ``--json``, which means the same
for every command, standard output holds one JSON document and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Commands", "add_json", "counted", "notes", "print_json", "print_line", "print_table"]

# What `argparse.ArgumentParser.add_subparsers` returns; argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001

# Columns of a file or a pipe, which has no width of its own.
_WIDTH = 160
# Rich's borders: one line between columns and at both ends, and a space on either side of a cell.
_BORDER = 3


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")


def counted(number: int, noun: str) -> str:
    """Return a number of things.

    Examples
    --------
    >>> counted(1, "kernel"), counted(2, "kernel")
    ('1 kernel', '2 kernels')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_json(data: object) -> None:
    """Print data as JSON."""
    print(json.dumps(data, indent=1))


def print_line(text: str) -> None:
    """Print a line as it is: the terminal breaks it if it must, so that a path can be copied."""
    _console().print(text, highlight=False, markup=False, soft_wrap=True)


def notes(options: argparse.Namespace) -> Console:
    """Return the console for what is said beside a result: standard error where the result is JSON."""
    console = Console(stderr=bool(options.json), highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", numbers: Sequence[str] = ()
) -> None:
    """Print rows as a table whose words are whole, or, where that is too wide, as a paragraph for each row.

    Parameters
    ----------
    columns
        Their names.
    rows
        A cell for each column.
    title
        Printed above.
    numbers
        Names of the columns that are aligned to the right.
    """
    console = _console()
    if title:
        console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    least = [max(map(_longest_word, (name, *cells))) for name, *cells in zip(columns, *rows, strict=True)]
    if sum(least) + _BORDER * len(columns) + 1 > console.width:
        _print_paragraphs(console, columns, rows)
        return
    table = Table()
    for name, width in zip(columns, least, strict=True):
        table.add_column(name, justify="right" if name in numbers else "left", min_width=width)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table, highlight=False)


def _print_paragraphs(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for first, *others in rows:
        lines = [f"    {name}: {cell}" for name, cell in zip(columns[1:], others, strict=True) if cell]
        console.print("\n".join([first, *lines]), highlight=False, markup=False, soft_wrap=True)


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _console() -> Console:
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    return console
