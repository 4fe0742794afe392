"""What counts as a kernel that does what the list says."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vagrant.report import Outcome, read, render

PASSES = "def test_passes(): pass\n"


CONFTEST = """
def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties.append(("hook_set", "cgroup" if "cgroup" in item.name else "trace"))
"""


def outcome_of(tests: str, folder: Path) -> Outcome:
    """Run `tests` for real, and read what came of those with the hook set trace."""
    return outcomes_of(tests, folder)["trace"]


def outcomes_of(tests: str, folder: Path) -> dict[str, Outcome]:
    file = folder / "test_it.py"
    file.write_text(f"import pytest\n{tests}")
    (folder / "conftest.py").write_text(CONFTEST)
    junit = folder / "junit.xml"
    arguments = ("-p", "no:cacheprovider", "-c", "/dev/null", f"--junit-xml={junit}", str(file))
    subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], stdout=subprocess.DEVNULL, check=False
    )
    outcomes = {name: Outcome("debian12", name) for name in ("trace", "cgroup")}
    read(junit, outcomes)
    return outcomes


def test_tests_that_pass_or_fail_as_expected_are_ok(tmp_path: Path) -> None:
    outcome = outcome_of(
        f"{PASSES}@pytest.mark.xfail(reason='no hook')\ndef test_xfails(): assert False\n", tmp_path
    )

    assert (outcome.passed, dict(outcome.xfailed)) == (1, {"no hook": 1})
    assert outcome.is_ok


@pytest.mark.parametrize(
    ("tests", "verdict"),
    [
        (f"{PASSES}def test_fails(): assert False\n", "failed"),
        (f"{PASSES}def test_is_not_set_up(absent): pass\n", "failed"),
        (f"{PASSES}def test_skips(): pytest.skip('no BTF')\n", "skipped what has to run"),
        ("", "no test ran"),
        ("def test_skips(): pytest.skip('no BTF')\n", "no test ran"),
    ],
)
def test_anything_else_is_not(tests: str, verdict: str, tmp_path: Path) -> None:
    outcome = outcome_of(tests, tmp_path)

    assert outcome.verdict() == verdict
    assert not outcome.is_ok


def test_a_hook_set_has_to_have_passed_something_itself(tmp_path: Path) -> None:
    outcomes = outcomes_of(PASSES, tmp_path)

    assert outcomes["trace"].is_ok
    assert outcomes["cgroup"].verdict() == "no test ran"


def test_results_that_are_missing_are_not_ok(tmp_path: Path) -> None:
    outcome = Outcome("debian12", "trace")

    read(tmp_path / "none.xml", {"trace": outcome})

    assert outcome.verdict() == "pytest wrote no results"


def test_the_table_names_what_failed_and_why_the_rest_did_not_run(tmp_path: Path) -> None:
    outcome = outcome_of(
        "def test_fails(): assert False\ndef test_skips(): pytest.skip('no BTF')\n", tmp_path
    )
    table = io.StringIO()

    Console(width=160, file=table).print(render([outcome]))

    shown = table.getvalue()
    assert "debian12, trace: 1 failed: test_it.py::test_fails" in shown
    assert "debian12, trace: 1 skipped: no BTF" in shown
