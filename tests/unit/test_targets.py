import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from peercredd import targets
from peercredd.targets import NotKnownNow, TargetError, is_valid, locate, unit_directory

Systemctl = Callable[[str], None]

SERVICE = {"LoadState": "loaded", "ControlGroup": "", "Id": "a.service", "Slice": "system.slice"}


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for cgroup v2."""
    root = tmp_path / "cgroup"
    make(root)
    monkeypatch.setattr(targets, "mount_points", lambda _: [root])
    return root


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    """A systemd that runs, and what systemctl does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(targets, "_SYSTEMD_RUNS", folder)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def install(script: str) -> None:
        program = folder / "systemctl"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return install


def make(cgroup: Path) -> Path:
    cgroup.mkdir(parents=True)
    (cgroup / "cgroup.controllers").touch()
    return cgroup


def shows(**properties: str) -> str:
    lines = "\n".join(f"{name}={value}" for name, value in {**SERVICE, **properties}.items())
    return f"cat <<'END'\n{lines}\nEND"


@pytest.mark.parametrize(
    "target",
    [
        "all",
        "/sys/fs/cgroup/a b",
        "/",
        "postgresql.service",
        "postgresql@15-main.service",
        r"dev-disk\x2d1.slice",
        "-.slice",
        "session-1.scope",
        "ssh.socket",
        "a:b_c.service",
    ],
)
def test_a_target_is_all_a_path_or_a_unit_that_has_processes(target: str) -> None:
    assert is_valid(target)


@pytest.mark.parametrize(
    "target",
    [
        "",
        "All",
        "postgresql",
        "user.slice/user-1000.slice",
        "relative/path",
        ".service",
        "getty@.service",
        "a.timer",
        "a.mount",
        "a b.service",
        "a.service\n",
        "/a\nb",
        "/a\x9bb",
        "/a\u2028b",
        "/\udcff",
        "../a.service",
        "--property=x.service/",
    ],
)
def test_anything_else_is_none(target: str) -> None:
    assert not is_valid(target)


@pytest.mark.parametrize(
    ("properties", "directory"),
    [
        ({"ControlGroup": "/system.slice/other.service"}, "system.slice/other.service"),
        ({"ControlGroup": "/", "Id": "-.slice"}, ""),
        ({}, "system.slice/a.service"),
        ({"Slice": ""}, "system.slice/a.service"),
        ({"Slice": "-.slice"}, "a.service"),
        ({"Slice": "user-1000.slice"}, "user.slice/user-1000.slice/a.service"),
        ({"Id": "a-b-c.slice", "Slice": "a-b.slice"}, "a.slice/a-b.slice/a-b-c.slice"),
        ({"Id": "-.slice", "Slice": ""}, ""),
    ],
)
def test_a_unit_is_where_systemd_has_it_or_will_make_it(
    properties: dict[str, str], directory: str
) -> None:
    assert unit_directory({**SERVICE, **properties}, Path("/cg")) == Path("/cg", directory)


def test_all_is_what_is_covered(hierarchy: Path) -> None:
    assert locate("all", hierarchy).directory == hierarchy


def test_a_path_need_not_exist_yet(hierarchy: Path) -> None:
    place = locate(f"{hierarchy}/a/./b/", hierarchy)

    assert place.directory == hierarchy / "a" / "b"
    assert place.absence.startswith("there is no such cgroup; make it")


@pytest.mark.parametrize("path", ["/", "/tmp", "{hierarchy}/..", "{hierarchy}/link"])
def test_what_is_outside_of_the_capture_is_refused(hierarchy: Path, path: str) -> None:
    (hierarchy / "link").symlink_to("/tmp")

    with pytest.raises(TargetError, match=r" is outside of the captured cgroup .*; name one in it"):
        locate(path.format(hierarchy=hierarchy), hierarchy)


def test_what_exists_and_is_no_cgroup_is_refused(hierarchy: Path) -> None:
    (hierarchy / "file").touch()
    (hierarchy / "folder").mkdir()

    for name in ("file", "folder"):
        with pytest.raises(TargetError, match=f"/{name} is no cgroup v2 directory; name one in "):
            locate(str(hierarchy / name), hierarchy)


def test_a_unit_that_runs_is_where_systemctl_says(hierarchy: Path, systemctl: Systemctl) -> None:
    make(hierarchy / "x.slice" / "a.service")
    systemctl(shows(ControlGroup="/x.slice/a.service"))

    assert locate("a.service", hierarchy).directory == hierarchy / "x.slice" / "a.service"


def test_systemctl_is_asked_for_the_unit_and_nothing_it_could_take_for_an_option(
    hierarchy: Path, systemctl: Systemctl, tmp_path: Path
) -> None:
    systemctl(f'echo "$@" > {tmp_path}/asked\n{shows()}')

    locate("-a.service", hierarchy)

    asked = (tmp_path / "asked").read_text()
    assert asked == "show --property=LoadState,ControlGroup,Id,Slice -- -a.service\n"


@pytest.mark.parametrize(
    ("state", "absence"),
    [
        ("loaded", "it does not run; `systemctl start a.service`, or name it in the config"),
        ("not-found", "systemd knows no such unit; `systemctl list-units --all` shows them"),
    ],
)
def test_of_a_unit_that_does_not_run_is_said_whether_there_is_one(
    hierarchy: Path, systemctl: Systemctl, state: str, absence: str
) -> None:
    systemctl(shows(LoadState=state))

    place = locate("a.service", hierarchy)

    assert place.directory == hierarchy / "system.slice" / "a.service"
    assert place.absence.startswith(absence)


def test_a_unit_outside_of_the_capture_is_refused_with_its_place(
    hierarchy: Path, systemctl: Systemctl
) -> None:
    systemctl(shows(ControlGroup="/system.slice/a.service"))

    with pytest.raises(
        TargetError, match=r"^a\.service \(.*/system\.slice/a\.service\) is outside"
    ):
        locate("a.service", make(hierarchy / "user.slice"))


def test_without_systemd_a_unit_is_nothing(
    hierarchy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_SYSTEMD_RUNS", hierarchy / "none")

    with pytest.raises(TargetError, match=r"^a\.service: systemd does not run here; name the path"):
        locate("a.service", hierarchy)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Failed to connect to bus' >&2; exit 1", "systemctl says: Failed to connect to bus"),
        ("exit 0", "systemctl says: nothing"),
    ],
)
def test_a_systemd_that_does_not_answer_is_no_statement_about_the_unit(
    hierarchy: Path, systemctl: Systemctl, script: str, said: str
) -> None:
    systemctl(script)

    with pytest.raises(NotKnownNow, match=f"a.service: {re.escape(said)}; "):
        locate("a.service", hierarchy)


def test_a_symbolic_link_is_the_cgroup_that_it_leads_to(hierarchy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(hierarchy / "later")
    assert locate(str(tmp_path / "link"), hierarchy).directory == hierarchy / "later"


@pytest.mark.parametrize("name", ["loop", "a" * 300, "a/" * 3000])
def test_a_path_that_leads_nowhere_is_no_cgroup_of_the_capture(
    hierarchy: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(TargetError, match="outside of the captured cgroup"):
        locate(str(tmp_path / name), hierarchy)
    assert not targets.is_cgroup(tmp_path / name)
