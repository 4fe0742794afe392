import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from peercred.cli.display import escape, print_json, print_table


@given(st.text())
def test_what_is_escaped_is_one_printable_line(text: str) -> None:
    assert escape(text).isprintable()


LETTERS = st.characters(exclude_categories=["C", "Z", "M"]).filter(
    lambda character: cell_len(character) > 0 and character not in "\u115f\u2800"
)


@given(st.text(LETTERS))
def test_what_can_be_seen_stays_as_it_is(text: str) -> None:
    assert escape(text) == text


@pytest.mark.parametrize(
    ("character", "escaped"),
    [
        ("\n", r"\n"),
        ("\x1b", r"\x1b"),
        ("\x9b", r"\x9b"),  # the one-byte form of ESC [
        ("\x7f", r"\x7f"),
        ("\u0301", r"\u0301"),  # a combining accent
        ("\u3164", r"\u3164"),  # a letter without a shape
        ("\u115f", r"\u115f"),
        ("\u2800", r"\u2800"),
        ("\u202e", r"\u202e"),  # turns what follows right to left
        ("\u2028", r"\u2028"),
        ("\u200b", r"\u200b"),
        ("\udcff", r"\udcff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_a_terminal_obeys_or_hides_is_escaped(character: str, escaped: str) -> None:
    assert escape(f"a{character}b") == f"a{escaped}b"


@given(st.dictionaries(st.text(), st.text()))
def test_json_is_one_line_of_ascii_that_means_the_same(document: dict[str, str]) -> None:
    with redirect_stdout(StringIO()) as stdout:
        print_json(document)

    (line,) = stdout.getvalue().splitlines()
    assert line.isascii()
    assert json.loads(line) == document


def test_columns_are_aligned_by_what_the_eye_sees(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("表", "1"), ("ab\n", "22")], ("N", "M"))

    assert capsys.readouterr().out == "N     M\n表    1\nab\\n  22\n"


def test_a_table_without_rows_is_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([], ("N", "M"))

    assert capsys.readouterr().out == "N  M\n"
