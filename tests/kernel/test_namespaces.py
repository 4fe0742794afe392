import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.netns import NetworkNamespace
from peercredd import namespaces

pytestmark = pytest.mark.kernel


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as namespace:
        yield namespace


@contextmanager
def inhabitant(namespace: NetworkNamespace) -> Iterator[subprocess.Popen[bytes]]:
    process: subprocess.Popen[bytes] = namespace.run(subprocess.Popen, ["sleep", "infinity"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def mounted(source: Path, place: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", source, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def path(namespace: NetworkNamespace) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{namespace.fd}")


def inode(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino


def reachable() -> list[int]:
    return [inode(each) for each in namespaces.reachable()]


def test_each_namespace_is_reached_once(namespace: NetworkNamespace) -> None:
    with inhabitant(namespace), inhabitant(namespace):
        found = reachable()
    own = Path("/proc/self/ns/net").stat().st_ino
    assert found.count(inode(namespace.fd)) == found.count(own) == 1
    assert len(found) == len(set(found))


def test_a_namespace_without_inhabitants_is_out_of_reach(namespace: NetworkNamespace) -> None:
    assert inode(namespace.fd) not in reachable()


def test_a_namespace_that_a_single_thread_is_in_is_reached(namespace: NetworkNamespace) -> None:
    assert inode(namespace.fd) in namespace.run(reachable)


@pytest.mark.parametrize("name", ["name", "a name\twith\\blanks", "nämë"])
def test_a_mounted_namespace_is_reached(
    namespace: NetworkNamespace, tmp_path: Path, name: str
) -> None:
    place = tmp_path / name
    place.touch()
    with mounted(path(namespace), place):
        assert inode(namespace.fd) in reachable()


def test_what_is_mounted_over_a_namespace_is_not_opened(
    namespace: NetworkNamespace, tmp_path: Path
) -> None:
    place, pipe = tmp_path / "place", tmp_path / "pipe"
    place.touch()
    os.mkfifo(pipe)  # to open it would block
    with mounted(path(namespace), place), mounted(pipe, place):
        assert inode(namespace.fd) not in reachable()


def test_an_inhabitant_may_end_meanwhile(namespace: NetworkNamespace) -> None:
    with inhabitant(namespace) as process:
        found = namespaces.reachable()
        next(found)  # the list of processes is read
        process.kill()
        process.wait()
        assert inode(namespace.fd) not in map(inode, found)


def test_a_visit_gives_the_cookie_and_ends_where_it_began(namespace: NetworkNamespace) -> None:
    own, there = namespaces.own_cookie(), namespace.run(namespaces.own_cookie)
    with namespaces.entered(namespace.fd) as cookie:
        assert cookie == there != own
        assert namespaces.own_cookie() == there
    assert namespaces.own_cookie() == own


def test_a_visit_that_fails_ends_where_it_began(namespace: NetworkNamespace) -> None:
    own = namespaces.own_cookie()
    with pytest.raises(ZeroDivisionError), namespaces.entered(namespace.fd):
        _ = 1 / 0
    assert namespaces.own_cookie() == own


def test_what_cannot_be_entered_is_an_error() -> None:
    own = namespaces.own_cookie()
    with (
        open("/proc/self/ns/uts") as other,
        pytest.raises(OSError, match="cannot be entered"),
        namespaces.entered(other.fileno()),
    ):
        pass
    assert namespaces.own_cookie() == own


def test_no_descriptor_is_left_open(namespace: NetworkNamespace) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with inhabitant(namespace):
        for each in namespaces.reachable():
            with namespaces.entered(each):
                pass
        next(namespaces.reachable())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
