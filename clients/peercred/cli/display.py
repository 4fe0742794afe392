"""How results reach people and programs: tables, one JSON document, nothing that a terminal obeys.

Names in an answer are chosen by the processes it is about. Whatever is printed
goes through `escape` or through JSON's own escapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_BLANK = "\u115f\u2800"
"""Letters and symbols, by Unicode's classes, that nobody sees: a filler and an empty pattern."""


class Styled(NamedTuple):
    """A cell with a rich style, which shows on terminals only."""

    text: str
    style: str


def escape(text: str) -> str:
    r"""`text` with all that cannot be seen as ``\xNN``, ``\uNNNN`` or ``\n``: one line, inert.

    Accents that come as characters of their own count among it: a pile of them covers the lines
    above.
    """
    return "".join(
        character if _is_visible(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def _is_visible(character: str) -> bool:
    return character.isprintable() and character not in _BLANK and cell_len(character) > 0


def print_line(text: str) -> None:
    """Print one escaped line to stdout."""
    print(escape(text))


def print_table(rows: Sequence[Sequence[str | Styled]], header: Sequence[str] = ()) -> None:
    """Print aligned columns, each cell escaped: fitted to a terminal, or whole into a pipe.

    A terminal that is too narrow gets cells folded over lines, never cut.
    """
    cells = [[_styled(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_to_terminal(cells, header)
    else:
        _print_to_pipe(cells, header)


def print_json(document: object) -> None:
    """Print `document` as one line of ASCII."""
    print(json.dumps(document, default=_to_json))


def _styled(cell: str | Styled) -> Styled:
    text, style = cell if isinstance(cell, Styled) else (cell, "")
    return Styled(escape(text), style)


def _print_to_terminal(rows: Sequence[Sequence[Styled]], header: Sequence[str]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(header))
    for index in range(len(rows[0]) if rows else len(header)):
        table.add_column(header[index] if header else "", overflow="fold", header_style="bold")
    for row in rows:
        # Text, not str: rich would read markup in a str.
        table.add_row(*(Text(cell.text, cell.style) for cell in row))
    Console().print(table)


def _print_to_pipe(rows: Sequence[Sequence[Styled]], header: Sequence[str]) -> None:
    lines = [*([header] if header else []), *([cell.text for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)
        )
        print("  ".join(padded).rstrip())


def _to_json(value: object) -> object:
    match value:
        case Enum():
            return value.value
        case IPv4Address() | IPv6Address():
            return str(value)
        case datetime():
            return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
