import grp
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from peercredd.listen import ListenError, UnixSocket

OWN_GROUP = grp.getgrgid(os.getegid()).gr_name
GROUP, GROUP_ID = "daemon", 1  # in every /etc/group
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's tmp_path is closed to other users.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "peercredd.sock"


def bound(to: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(to)
    listener.listen()
    return listener


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def refused(path: Path) -> str:
    with pytest.raises(ListenError) as raised, UnixSocket(path, OWN_GROUP):
        pass
    text = str(raised.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def holding(path: Path) -> subprocess.Popen[str]:
    """Another process that listens at `path`, until its stdin is closed or it is killed."""
    program = (
        "import socket, sys; from pathlib import Path; from peercredd.listen import UnixSocket\n"
        "path, group = Path(sys.argv[1]), sys.argv[2]\n"
        "with UnixSocket(path, group) as own, socket.socket(socket.AF_UNIX) as s:\n"
        "    s.bind(own.private_path); s.listen(); own.publish()\n"
        "    print('published', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, path, OWN_GROUP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "published\n"
    return process


def as_user(uid: int, groups: list[int], path: Path) -> int:
    """Exit status of a connect() by another user."""
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    return subprocess.run(
        ["/usr/bin/python3", "-c", program, path],
        user=uid,
        group=uid,
        extra_groups=groups,
        stderr=subprocess.DEVNULL,
        check=False,
    ).returncode


def test_a_socket_is_there_when_published_and_not_before(path: Path) -> None:
    with UnixSocket(path, OWN_GROUP) as own, bound(own.private_path):
        assert not path.exists()
        own.publish()
        assert connects(path)


def test_nothing_but_the_socket_and_its_lock_is_beside_it_and_nothing_at_all_afterwards(
    folder: Path, path: Path
) -> None:
    with UnixSocket(path, OWN_GROUP) as own, bound(own.private_path):
        own.publish()
        assert names(folder) == {"peercredd.sock", "peercredd.sock.lock"}
    assert names(folder) == set()


def test_nothing_is_left_of_a_socket_that_was_never_published(folder: Path, path: Path) -> None:
    with UnixSocket(path, OWN_GROUP) as own, bound(own.private_path):
        pass
    assert names(folder) == set()


def test_before_it_is_published_only_its_owner_can_reach_it(folder: Path, path: Path) -> None:
    with UnixSocket(path, OWN_GROUP) as own, bound(own.private_path):
        (private,) = [entry for entry in folder.iterdir() if entry.is_dir()]
        assert stat.S_IMODE(private.stat().st_mode) == 0o700


@pytest.mark.root
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_root_and_the_group_may_connect_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with UnixSocket(path, GROUP) as own, bound(own.private_path):
            own.publish()
            status = path.stat()
            assert stat.filemode(status.st_mode) == "srw-rw----"
            assert (status.st_uid, status.st_gid) == (0, GROUP_ID)
            assert as_user(NOBODY, [GROUP_ID], path) == 0
            assert as_user(NOBODY, [], path) != 0
    finally:
        os.umask(before)


@pytest.mark.root
def test_without_the_group_only_root_may_connect_and_the_log_says_so(path: Path) -> None:
    with UnixSocket(path, "no-such-group") as own, bound(own.private_path):
        with capture_logs() as logs:
            own.publish()
        assert stat.filemode(path.stat().st_mode) == "srw-------"
        assert as_user(NOBODY, [GROUP_ID], path) != 0
    (entry,) = logs
    assert entry["log_level"] == "warning"
    assert entry["group"] == "no-such-group"


@pytest.mark.root
def test_missing_folders_are_made_open_to_all_whatever_the_umask(folder: Path) -> None:
    path = folder / "a" / "b" / "peercredd.sock"
    before = os.umask(0o077)
    try:
        with UnixSocket(path, GROUP) as own, bound(own.private_path):
            own.publish()
            for made in (path.parent, path.parent.parent):
                assert stat.S_IMODE(made.stat().st_mode) == 0o755
            assert as_user(NOBODY, [GROUP_ID], path) == 0
    finally:
        os.umask(before)


def test_the_longest_path_that_clients_can_name_is_good_and_one_more_is_not(folder: Path) -> None:
    longest = folder / ("s" * (107 - len(str(folder)) - 1))
    with UnixSocket(longest, OWN_GROUP) as own, bound(own.private_path):
        own.publish()
        assert connects(longest)

    assert "at most 107" in refused(folder / (longest.name + "s"))


def test_a_second_process_is_refused_and_told_which_one_has_it(path: Path) -> None:
    with holding(path) as first:
        assert f"process {first.pid};" in refused(path)
        assert connects(path)


def test_a_socket_left_by_a_killed_process_is_replaced(folder: Path, path: Path) -> None:
    with holding(path) as first:
        first.kill()
        first.wait()
    assert path.is_socket()

    with UnixSocket(path, OWN_GROUP) as own, bound(own.private_path):
        assert not connects(path)
        own.publish()
        assert connects(path)
    assert names(folder) == set()


def test_a_live_socket_of_another_program_is_not_stolen(path: Path) -> None:
    with bound(str(path)):
        assert f"process {os.getpid()};" in refused(path)
        assert connects(path)


def test_a_live_socket_with_a_full_queue_is_not_stolen(path: Path) -> None:
    with bound(str(path)) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.listen(0)
        first.connect(str(path))
        assert "in use by another process" in refused(path)


def test_what_is_not_a_socket_is_left_alone(folder: Path, path: Path) -> None:
    path.write_text("precious")

    assert "not a socket" in refused(path)
    assert path.read_text() == "precious"
    assert names(folder) == {path.name}


def test_a_symbolic_link_is_not_followed(folder: Path, path: Path) -> None:
    with bound(str(folder / "elsewhere")):
        path.symlink_to("elsewhere")

        assert "not a socket" in refused(path)
        assert path.is_symlink()


def test_a_folder_that_is_a_file_is_named(folder: Path) -> None:
    (folder / "file").touch()

    assert str(folder / "file") in refused(folder / "file" / "peercredd.sock")


def test_a_socket_put_in_its_place_since_is_not_removed(path: Path) -> None:
    with UnixSocket(path, OWN_GROUP) as own, bound(own.private_path):
        own.publish()
        path.unlink()
        other = bound(str(path))
    with other:
        assert connects(path)


def test_a_socket_that_somebody_removed_is_no_error(folder: Path, path: Path) -> None:
    with UnixSocket(path, OWN_GROUP) as own, bound(own.private_path):
        own.publish()
        path.unlink()
    assert names(folder) == set()


def test_the_lock_cannot_be_taken_by_other_users(path: Path) -> None:
    with UnixSocket(path, OWN_GROUP):
        assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) == 0o600


def test_no_two_processes_ever_hold_one_path(folder: Path, path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from peercredd.listen import ListenError, UnixSocket\n"
        "path, proof, entered = Path(sys.argv[1]), sys.argv[2], 0\n"
        "while entered < 100:\n"
        "    try:\n"
        "        with UnixSocket(path, 'daemon'):\n"
        "            os.mkdir(proof); os.rmdir(proof); entered += 1\n"
        "    except ListenError as error:\n"
        "        assert 'in use by' in str(error), error\n"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", program, path, folder / "proof"]) for _ in range(4)
    ]
    assert [racer.wait() for racer in racers] == [0, 0, 0, 0]


def test_a_lock_that_names_nobody_is_still_a_lock(path: Path) -> None:
    with UnixSocket(path, OWN_GROUP):
        os.truncate(f"{path}.lock", 0)
        assert "in use by another process;" in refused(path)
