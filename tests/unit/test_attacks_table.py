"""docs/attacks.md names tests that are there, and all that are about attacks."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGE = PROJECT / "docs" / "attacks.md"
HEADER = ["attack", "deceives", "what happens here", "test"]


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(HEADER) for row in cells)
    return [row for row in cells if row != HEADER and set(row) != {"---"}]


def named() -> list[str]:
    return [test for row in rows() for test in re.findall(r"`(tests/[^`]+)`", row[3])]


def functions_of(file: Path) -> set[str]:
    functions = ast.walk(ast.parse(file.read_text()))
    return {
        each.name
        for each in functions
        if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")
    }


@pytest.mark.parametrize("test", sorted(set(named())))
def test_a_test_that_a_row_names_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert name in functions_of(PROJECT / file)


def test_every_attack_has_a_row() -> None:
    attacks = {
        f"{file.relative_to(PROJECT)}::{name}"
        for file in sorted((PROJECT / "tests" / "attacks").glob("test_*.py"))
        for name in functions_of(file)
    }
    assert attacks
    assert attacks - set(named()) == set()


def test_every_row_says_all_and_names_one_test_that_no_other_row_names() -> None:
    assert all(all(row) for row in rows())
    assert len(named()) == len(rows())
    assert [test for test, count in Counter(named()).items() if count > 1] == []
