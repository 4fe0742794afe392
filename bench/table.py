"""The one table that a run prints, and the same figures as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from rich.table import Table

VALUE_COLUMNS = 4


class Unit(Enum):
    """What a figure counts. Figures are held in base units: seconds, bytes, per second."""

    SECONDS = "s"
    PER_SECOND = "1/s"
    BYTES = "bytes"
    COUNT = "count"
    RATIO = "ratio"

    def text(self, figure: float) -> str:
        """Write `figure` for people, in the unit that suits its size."""
        match self:
            case Unit.SECONDS if figure < 1e-6:
                return f"{figure * 1e9:.3g} ns"
            case Unit.SECONDS if figure < 1e-3:
                return f"{figure * 1e6:.3g} µs"
            case Unit.SECONDS if figure < 1:
                return f"{figure * 1e3:.3g} ms"
            case Unit.SECONDS:
                return f"{figure:.2f} s"
            case Unit.PER_SECOND:
                return f"{figure:,.0f}/s"
            case Unit.BYTES:
                return f"{figure / 1e6:.1f} MB"
            case Unit.COUNT:
                return f"{figure:,.0f}"
            case Unit.RATIO:
                return f"x{figure:.3f}" if figure < 10 else f"x{figure:.0f}"


@dataclass(frozen=True)
class Target:
    """A promise about a verdict's figure: `limit` is the worst that passes."""

    limit: float
    at_least: bool = False

    def met(self, figure: float) -> bool:
        """Whether `figure` passes."""
        return figure >= self.limit if self.at_least else figure <= self.limit


@dataclass(frozen=True)
class Verdict:
    """What a row comes down to, and the promise it is held to, if there is one."""

    figure: float
    unit: Unit = Unit.RATIO
    target: Target | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.target.met(self.figure)

    def texts(self) -> tuple[str, str]:
        """Write the figure, and the target with its outcome."""
        figure = self.unit.text(self.figure)
        if self.target is None:
            return figure, ""
        sign = "≥" if self.target.at_least else "≤"
        outcome = "[green]pass[/]" if self.passed else "[bold red]MISS[/]"
        return figure, f"{sign} {self.unit.text(self.target.limit)} {outcome}"


@dataclass(frozen=True)
class Row:
    """One thing measured. A value that could not be had is None."""

    name: str
    values: tuple[float | None, ...]
    unit: Unit
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Section:
    """Rows that share their column headings."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def render(sections: list[Section], caption: str) -> Table:
    """All sections as one table: each brings its own headings for the value columns."""
    table = Table(show_header=False, highlight=False, caption=caption)
    table.add_column(no_wrap=True)
    for _ in range(VALUE_COLUMNS + 1):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for section in sections:
        table.add_section()
        headings = _padded(section.columns)
        table.add_row(section.title, *headings, "", "target", style="bold")
        for row in section.rows:
            values = _padded(
                tuple("-" if value is None else row.unit.text(value) for value in row.values)
            )
            table.add_row(row.name, *values, *(row.verdict.texts() if row.verdict else ("", "")))
    return table


def as_json(sections: list[Section]) -> list[dict[str, Any]]:
    """The sections as plain data; each verdict with its `passed` (null: no promise)."""
    document = [asdict(section) for section in sections]
    for section, plain in zip(sections, document, strict=True):
        for row, plain_row in zip(section.rows, plain["rows"], strict=True):
            plain_row["unit"] = row.unit.value
            if row.verdict is not None:
                plain_row["verdict"]["unit"] = row.verdict.unit.value
                plain_row["verdict"]["passed"] = row.verdict.passed
    return document


def _padded(cells: tuple[str, ...]) -> tuple[str, ...]:
    return cells + ("",) * (VALUE_COLUMNS - len(cells))
