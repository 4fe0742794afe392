"""What the lab does when a machine is lost, and what it does not do when a test fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from vagrant import kernels, suite
from vagrant.box import Box
from vagrant.errors import LabError, MachineError
from vagrant.report import Outcome

LOST = MachineError("debian12 hung", "watchdog: BUG: soft lockup")


def outcomes_of(
    machines: list[LabError | None],
    logs: Path,
    monkeypatch: pytest.MonkeyPatch,
    failed: tuple[str, ...] = (),
) -> list[Outcome]:
    """What the suite makes of machines that raise these, one after the other.

    In a machine that raises nothing one test passes with each hook set, and others fail.
    """

    @asynccontextmanager
    async def running(*_: object) -> AsyncIterator[None]:
        if error := machines.pop(0):
            raise error
        yield

    async def run_tests(
        guest: object, kernel: object, outcomes: dict[str, Outcome], *rest: object
    ) -> None:
        for outcome in outcomes.values():
            outcome.passed = 1
            outcome.failed.update(failed)

    monkeypatch.setattr(suite, "running", running)
    monkeypatch.setattr(suite, "_test_in", run_tests)
    box = Box(kernels.find("debian12"), logs)
    testing = suite.test(box, "tcg", 1, ("trace", "cgroup"), (), logs, echo=False)
    return asyncio.run(testing)


def test_a_machine_that_was_lost_is_booted_anew_and_each_row_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = outcomes_of([LOST, None], tmp_path, monkeypatch)

    assert [outcome.hook_set for outcome in outcomes] == ["trace", "cgroup", "any"]
    for outcome in outcomes:
        assert outcome.is_ok
        assert outcome.passed == 1
        assert outcome.remarks == ["debian12 hung; booted anew, once"]


def test_the_logs_of_a_machine_that_was_lost_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes_of([LOST, None], tmp_path, monkeypatch)

    assert [path.name for path in tmp_path.iterdir()] == [suite.AGAIN]


def test_a_second_loss_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = outcomes_of([LOST, LOST, None], tmp_path, monkeypatch)

    assert [outcome.verdict() for outcome in outcomes] == ["debian12 hung"] * 3
    assert outcomes[0].remarks == [LOST.log, "debian12 hung; booted anew, once"]


def test_what_fails_in_a_machine_that_is_alive_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = [LabError("./dev setup failed in the machine"), None]

    outcomes = outcomes_of(machines, tmp_path, monkeypatch)

    assert machines == [None]
    assert not any(outcome.is_ok or outcome.remarks for outcome in outcomes)


def test_a_test_that_fails_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines: list[LabError | None] = [None, None]

    outcomes = outcomes_of(machines, tmp_path, monkeypatch, failed=("test_it",))

    assert machines == [None]
    assert [outcome.verdict() for outcome in outcomes] == ["failed"] * 3
