"""What came of the tests: one table, and the reasons of what did not run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Group
from rich.table import Table
from rich.text import Text


@dataclass
class Outcome:
    """One hook set's tests on one kernel, or what else was found out there."""

    kernel: str
    hook_set: str
    running: str = ""
    """The kernel and the BCC that were found: ``6.1.0-56-cloud-amd64, 0.26.0``."""
    seconds: float = 0.0
    passed: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Tests that failed, and those that could not be set up."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Reasons, and how many tests were skipped for each."""
    xfailed: Counter[str] = field(default_factory=Counter)
    """Reasons, and how many tests failed as expected for each."""
    problem: str = ""
    """What else is wrong, in a line."""
    remarks: list[str] = field(default_factory=list)
    """What is worth knowing though all may be well."""

    def verdict(self) -> str:
        """``ok``, or why not: what should pass there and was skipped has not passed."""
        if self.problem:
            return self.problem
        if self.failed:
            return "failed"
        if self.skipped:
            return "skipped what has to run"
        return "ok"

    @property
    def is_ok(self) -> bool:
        """Whether the kernel does what the list says."""
        return self.verdict() == "ok"


ANY = "any"
"""What tests are said to run with that ask for no hook set."""


def read(junit: Path, outcomes: dict[str, Outcome]) -> None:
    """Add what pytest's junit file tells of each hook set to the outcome of that name.

    A hook set without a test that ran has a problem; so have all if pytest wrote nothing.
    """
    if not junit.exists():
        for outcome in outcomes.values():
            outcome.problem = "pytest wrote no results"
        return
    for case in ElementTree.parse(junit).iter("testcase"):
        found = case.find("properties/property[@name='hook_set']")
        outcome = outcomes[ANY if found is None else found.get("value", ANY)]
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        skipped = case.find("skipped")
        outcome.seconds += float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed[name] += 1
        elif skipped is None:
            outcome.passed += 1
        elif skipped.get("type") == "pytest.xfail":
            outcome.xfailed[skipped.get("message") or "no reason"] += 1
        else:
            outcome.skipped[skipped.get("message") or "no reason"] += 1
    for name, outcome in outcomes.items():
        if name != ANY and not outcome.passed and not outcome.failed:
            outcome.problem = "no test ran"


def render(outcomes: list[Outcome]) -> Group:
    """One row for each outcome, and below the reasons."""
    table = Table(title="Kernels, and what was seen on them", title_justify="left")
    for name in ("kernel", "found there", "hook set"):
        table.add_column(name)
    for name in ("passed", "failed", "skipped", "xfailed", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    notes: list[Text] = []
    for outcome in outcomes:
        counts = (outcome.failed, outcome.skipped, outcome.xfailed)
        table.add_row(
            outcome.kernel,
            outcome.running,
            outcome.hook_set,
            str(outcome.passed),
            *(str(count.total()) for count in counts),
            f"{outcome.seconds:.0f}",
            Text(outcome.verdict(), "green" if outcome.is_ok else "red"),
        )
        where = f"{outcome.kernel}, {outcome.hook_set}"
        notes += [Text(f"{where}: {remark}") for remark in outcome.remarks]
        for what, reasons in zip(("failed", "skipped", "xfailed"), counts, strict=True):
            notes += [Text(f"{where}: {n} {what}: {why}") for why, n in reasons.most_common()]
    return Group(table, *notes)
