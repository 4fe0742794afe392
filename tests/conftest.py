"""Fixtures of the tests that load BPF programs, and what the machine has to allow."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from harness import set_user_id, shares, sweeps
from harness.actors import Origin
from harness.cgroup import Cgroup
from harness.daemon import CACHE, Client, Daemon
from harness.patience import patient
from harness.requirements import (
    cannot_run,
    why_no_hook_set,
    why_no_kernel,
    why_no_root,
    why_no_systemd,
)
from harness.stage import Stage
from peercredd import preemption
from peercredd.hooks import HOOK_SETS

CHOSEN_HOOK_SETS = pytest.StashKey[tuple[str, ...]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hook-set",
        action="append",
        choices=HOOK_SETS,
        help="test with this hook set; may be repeated. "
        "The default is cgroup, and trace on a kernel where --hooks auto takes it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """What these tests, and the processes they start, need of the machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if CACHE not in os.environ:  # else a worker, or somebody keeps it from run to run
        os.environ[CACHE] = tempfile.mkdtemp(prefix="peercredd-test-cache-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(CACHE)))
    # A shell has what it starts in the background ignore it, and exec(2) hands that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "hook_sets(*names): of a promise that only these hook sets can keep"
    )
    config.addinivalue_line("markers", "systemd: starts units; left out where systemd does not run")
    # BCC 0.37 declares its structures in a way that Python 3.14 warns of.
    config.addinivalue_line("filterwarnings", "ignore:Due to '_pack_':DeprecationWarning")
    config.stash[CHOSEN_HOOK_SETS] = tuple(
        config.getoption("hook_set")
        or (name for name in HOOK_SETS if name == "cgroup" or not why_not_by_itself(name))
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    chosen = config.stash[CHOSEN_HOOK_SETS]
    left_out = (name for name in HOOK_SETS if name not in chosen)
    return [
        f"hook sets: {', '.join(chosen)}",
        *(f"not {name}: {why_not_by_itself(name) or 'not asked for'}" for name in left_out),
        *([f"no units of systemd: {reason}"] if (reason := why_no_systemd()) else []),
    ]


def why_not_by_itself(hook_set: str) -> str | None:
    """Why it is not tested with a hook set unless that is asked for."""
    return why_no_hook_set(hook_set) or (
        preemption.why_not_to_trace() if hook_set == "trace" else None
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each kernel test once with every hook set."""
    if "hook_set" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("hook_sets")
        names = only.args if only else HOOK_SETS
        metafunc.parametrize("hook_set", names, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the hook sets that were not chosen, and units; be patient with a slow machine."""
    hook_sets = {*config.stash[CHOSEN_HOOK_SETS], None}

    def wanted(item: pytest.Item) -> bool:
        needs_systemd = item.get_closest_marker("systemd") is not None
        return hook_set_of(item) in hook_sets and not (needs_systemd and why_no_systemd())

    config.hook.pytest_deselected(items=[each for each in items if not wanted(each)])
    items[:] = [each for each in items if wanted(each)]
    for item in items:
        marked = item.get_closest_marker("timeout")
        seconds = marked.args[0] if marked else config.getoption("timeout")
        limit = patient(float(seconds or config.getini("timeout")))
        item.add_marker(pytest.mark.timeout(limit), append=False)
        item.user_properties.append(("hook_set", hook_set_of(item) or "any"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this machine cannot run."""
    for marker, why_not in (("root", why_no_root), ("kernel", why_no_kernel)):
        if item.get_closest_marker(marker) and (reason := why_not()):
            cannot_run(reason)
    if (hook_set := hook_set_of(item)) and (reason := why_no_hook_set(hook_set)):
        cannot_run(f"{hook_set}: {reason}")


def hook_set_of(item: pytest.Item) -> str | None:
    """The hook set that a test runs with; None where none is asked for."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("hook_set") if callspec else None


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
def hook_set(request: pytest.FixtureRequest) -> str:
    """The name of a hook set."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def cgroup() -> Iterator[Cgroup]:
    """A cgroup of this test process's own."""
    with Cgroup() as cgroup:
        yield cgroup


@pytest.fixture(scope="session")
def daemon(cgroup: Cgroup, hook_set: str) -> Iterator[Daemon]:
    """A running daemon that captures in `cgroup`."""
    with Daemon(cgroup, hook_set) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of `daemon`."""
    with daemon.client() as client:
        yield client


@pytest.fixture(scope="session")
def origin(cgroup: Cgroup) -> Iterator[Origin]:
    """Where actors in `cgroup` come from."""
    with Origin(cgroup) as origin:
        yield origin


@pytest.fixture
def stage(origin: Origin, daemon: Daemon, client: Client) -> Iterator[Stage]:
    """A scenario of this test's own, that has to leave no record behind, nor a charge for one."""
    before = shares.charged(daemon)
    with Stage(origin, client) as stage:
        yield stage
    shares.wait_until(daemon, before)


@pytest.fixture
def setuid_folder() -> Iterator[Path]:
    """A folder all may enter, where set-user-ID bits count."""
    with set_user_id.open_folder() as folder:
        yield folder


@pytest.fixture
def swept_stage(origin: Origin, daemon: Daemon, client: Client) -> Iterator[Stage]:
    """A scenario during which what is a second old is swept all the time."""
    with sweeps.sweeping(daemon), Stage(origin, client) as stage:
        yield stage
