"""Fixtures of the tests that load BPF programs, and what the machine has to allow."""

from __future__ import annotations

import resource
from collections.abc import Generator, Iterator

import pytest

import peercred
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import HOOK_SETS, Daemon
from harness.requirements import cannot_run, why_no_kernel, why_no_root
from harness.stage import Stage


def pytest_configure() -> None:
    """Allow these tests, and the processes they start, more than 1024 open files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this machine cannot run."""
    for marker, why_not in (("root", why_no_root), ("kernel", why_no_kernel)):
        if item.get_closest_marker(marker) and (reason := why_not()):
            cannot_run(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Print the daemon's log with a test that fails."""
    report = yield
    daemon = getattr(item, "funcargs", {}).get("daemon")
    if report.failed and daemon:
        report.sections.append(("peercredd", daemon.log()))
    return report


@pytest.fixture(scope="session")
def cgroup() -> Iterator[Cgroup]:
    """A cgroup of this test process's own."""
    with Cgroup() as cgroup:
        yield cgroup


@pytest.fixture(scope="session", params=HOOK_SETS)
def daemon(cgroup: Cgroup, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A running daemon that captures in `cgroup`."""
    with Daemon(cgroup, request.param) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def client(daemon: Daemon) -> Iterator[peercred.Client]:
    """A client of `daemon`."""
    with peercred.Client(daemon.address) as client:
        yield client


@pytest.fixture(scope="session")
def origin(cgroup: Cgroup) -> Iterator[Origin]:
    """Where actors in `cgroup` come from."""
    with Origin(cgroup) as origin:
        yield origin


@pytest.fixture
def stage(origin: Origin, daemon: Daemon, client: peercred.Client) -> Iterator[Stage]:
    """A scenario of this test's own, that has to leave no record behind."""
    with Stage(origin, client) as stage:
        yield stage


@pytest.fixture(scope="session", params=HOOK_SETS)
def sweeping(request: pytest.FixtureRequest) -> Iterator[tuple[Origin, peercred.Client]]:
    """Actors and a client of a daemon that sweeps every second what is a second old."""
    with (
        Cgroup() as cgroup,
        Daemon(
            cgroup,
            request.param,
            *("--sweep-interval-seconds", "1"),
            *("--sweep-pending-age-seconds", "1"),
            *("--sweep-record-age-seconds", "1"),
        ) as daemon,
        Origin(cgroup) as origin,
        peercred.Client(daemon.address) as client,
    ):
        yield origin, client


@pytest.fixture
def swept_stage(sweeping: tuple[Origin, peercred.Client]) -> Iterator[Stage]:
    """A scenario under a daemon that sweeps every second."""
    with Stage(*sweeping) as stage:
        yield stage
