"""What building a box refuses, and what it leaves behind when it is interrupted."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess

import pytest

from harness.lab import HANGS, Lab, on_a_small_disk
from harness.patience import patient

NOBODY = ("unshare", "--user", "--map-user=65534", "--")


def test_without_root_no_box_is_built(lab: Lab) -> None:
    assert "not root" in lab.refusal("vm-box", "debian12", before=NOBODY)


@pytest.mark.root
def test_without_space_nothing_is_begun(lab: Lab) -> None:
    lab.folder.mkdir()

    said = lab.refusal("vm-box", "debian12", before=on_a_small_disk(lab.folder))

    assert "64 MiB free" in said
    assert "PEERCREDD_LAB" in said


@pytest.mark.root
@pytest.mark.usefixtures("needs_qemu")
def test_without_space_no_box_is_packed(lab: Lab) -> None:
    lab.box(HANGS)
    kept = lab.folder.rename(lab.folder.with_name("kept"))
    lab.folder.mkdir()
    copying = ("sh", "-c", 'cp -r "$0/." "$1" && shift && exec "$@"', str(kept), str(lab.folder))

    said = lab.refusal("vm-box", "debian12", before=(*on_a_small_disk(lab.folder), *copying))

    assert "MiB free" in said
    assert "PEERCREDD_LAB" in said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of such a machine's two names")
def test_on_a_machine_of_another_architecture_one_line_says_what_to_do(lab: Lab) -> None:
    said = lab.refusal("vm-test", "debian12", before=("setarch", "i686"))

    assert "for x86_64, and this machine is i686; run the lab on another" in said


@pytest.mark.usefixtures("needs_qemu")
def test_a_box_for_another_architecture_is_refused_with_the_way_to_another(lab: Lab) -> None:
    box = lab.box(HANGS, architecture="arm64")

    said = lab.refusal("vm-test", "debian12")

    assert "is for arm64, and amd64 is needed" in said
    assert f"rm -r {box.folder}" in said


@pytest.mark.root
@pytest.mark.usefixtures("needs_mmdebstrap")
def test_a_mirror_that_does_not_answer_is_named_and_leaves_nothing(lab: Lab) -> None:
    with socket.socket() as bound:  # and so nobody else's, but it does not listen
        bound.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{bound.getsockname()[1]}/debian"

        said = lab.refusal("vm-box", "debian12", PEERCREDD_DEBIAN_MIRROR=mirror)

    assert "mmdebstrap failed" in said
    assert "PEERCREDD_DEBIAN_MIRROR" in said
    assert contents(lab) == ["debian12.lock"]


@pytest.mark.root
@pytest.mark.usefixtures("needs_mmdebstrap")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_interrupted_leaves_no_process_and_no_half_box(
    lab: Lab, number: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        process, download = building(lab, mirror)

        process.send_signal(number)

        until_ended(download)
        assert process.wait(patient(60)) != 0
    assert contents(lab) == ["debian12.lock"]


@pytest.mark.root
@pytest.mark.usefixtures("needs_mmdebstrap")
def test_a_build_that_is_killed_leaves_no_process_and_what_the_next_one_removes(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        process, download = building(lab, mirror)

        process.kill()

        until_ended(download)
    assert len(contents(lab)) == 2

    lab.refusal("vm-box", "debian12", PEERCREDD_DEBIAN_MIRROR="http://127.0.0.1:1/debian")

    assert contents(lab) == ["debian12.lock"]


@pytest.mark.usefixtures("needs_qemu")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_box_that_is_interrupted_while_it_is_packed_is_not_left_half(
    lab: Lab, number: signal.Signals
) -> None:
    box = lab.box(HANGS)
    os.truncate(box.disk, 1 << 43)  # as good as without end
    process = lab.start("vm-box", "debian12")
    half = box.folder / "half.box"
    while not half.exists():
        assert process.poll() is None, process.communicate()
        os.sched_yield()

    process.send_signal(number)

    assert process.wait(patient(60)) != 0
    assert not half.exists()
    assert not box.packed.exists()


def building(lab: Lab, mirror: socket.socket) -> tuple[subprocess.Popen[str], socket.socket]:
    """Begin a build from a mirror that never answers, and wait until it is asked."""
    address = "http://{}:{}/debian".format(*mirror.getsockname())
    process = lab.start("vm-box", "debian12", PEERCREDD_DEBIAN_MIRROR=address)
    mirror.settimeout(patient(60))
    download, _ = mirror.accept()
    download.settimeout(patient(60))
    return process, download


def until_ended(download: socket.socket) -> None:
    """Wait until no process has the download's other end."""
    with download:
        while download.recv(1 << 16):
            pass


def contents(lab: Lab) -> list[str]:
    return sorted(path.name for path in lab.folder.iterdir())
