"""Boxes: a disk, a kernel and an initrd, built out of Debian packages and kept."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from vagrant import disk, recipe
from vagrant.errors import LabError, tail
from vagrant.kernels import Kernel

MIRROR = "http://deb.debian.org/debian"
SPACE_TO_BUILD = 4 << 30  # bytes
_MACHINES = {"amd64": "x86_64"}


@dataclass(frozen=True)
class Box:
    """A box that is whole."""

    kernel: Kernel
    folder: Path

    @property
    def disk(self) -> Path:
        """One ext4 partition behind GRUB, in qcow2."""
        return self.folder / "disk.qcow2"

    @property
    def vmlinuz(self) -> Path:
        """The kernel, for QEMU to start without a boot loader."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """Its initial RAM disk."""
        return self.folder / "initrd.img"

    @property
    def packed(self) -> Path:
        """What ``vagrant box add`` takes; `pack` makes it."""
        return self.folder / f"{self.kernel.name}.box"


class _Facts(msgspec.Struct):
    architecture: str


def lab() -> Path:
    """The folder of boxes: ``$PEERCREDD_LAB``, else one in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEERCREDD_LAB") or Path(cache) / "peercredd" / "lab")


def existing(kernel: Kernel) -> Box | None:
    """Return the kernel's box if it was built from the present recipe.

    Raises:
        LabError: it was built for another architecture.
    """
    box = Box(kernel, lab() / f"{kernel.name}-{recipe.fingerprint(kernel)}")
    if not box.folder.exists():
        return None
    facts = msgspec.json.decode((box.folder / "box.json").read_bytes(), type=_Facts)
    if facts.architecture != recipe.ARCHITECTURE:
        raise LabError(
            f"the box {box.folder} is for {facts.architecture}, and {recipe.ARCHITECTURE} is "
            f"needed; remove it, and it is built again: rm -r {box.folder}"
        )
    return box


def get(kernel: Kernel) -> Box:
    """Return the kernel's box; build it if there is none of the present recipe.

    Two that want the same box at once build it once. Whatever interrupts a build leaves at
    most a folder that the next one removes.

    Raises:
        LabError: it cannot be built.
    """
    if platform.machine() != _MACHINES[recipe.ARCHITECTURE]:
        raise LabError(
            f"the lab's kernels are for {_MACHINES[recipe.ARCHITECTURE]}, and this machine is "
            f"{platform.machine()}; run the lab on another, and ./dev test here"
        )
    if box := existing(kernel):
        return box
    if os.geteuid() != 0:
        raise LabError("not root, as building a box needs; run this with sudo")
    lab().mkdir(parents=True, exist_ok=True)
    with _locked(kernel):
        if box := existing(kernel):
            return box
        unfinished = f".building-{kernel.name}."
        for stale in lab().glob(f"{unfinished}*"):
            shutil.rmtree(stale)
        _require_space()
        click.echo(f"{kernel.name}: building its box out of Debian packages", err=True)
        whole = lab() / f"{kernel.name}-{recipe.fingerprint(kernel)}"
        with tempfile.TemporaryDirectory(prefix=unfinished, dir=lab()) as building:
            box = Box(kernel, Path(building, "box"))
            box.folder.mkdir()
            _build(box, Path(building))
            box.folder.rename(whole)
        for other in lab().glob(f"{kernel.name}-{'[0-9a-f]' * 12}"):
            if other != whole:
                shutil.rmtree(other)
    return Box(kernel, whole)


def pack(box: Box) -> Path:
    """Return the box as Vagrant takes it, for the libvirt provider."""
    with _locked(box.kernel):
        if box.packed.exists():
            return box.packed
        _require_space()
        half = box.folder / "half.box"
        described = box.folder / "metadata.json"
        described.write_bytes(
            msgspec.json.encode(
                {
                    "provider": "libvirt",
                    "format": "qcow2",
                    "virtual_size": recipe.DISK_SIZE >> 30,
                    "architecture": recipe.ARCHITECTURE,
                }
            )
        )
        try:
            with tarfile.open(half, "w") as archive:
                archive.add(described, described.name)
                archive.add(box.disk, "box.img")
        except BaseException:
            half.unlink()
            raise
        return half.rename(box.packed)


@contextmanager
def _locked(kernel: Kernel) -> Iterator[None]:
    with (lab() / f"{kernel.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo(f"{kernel.name}: its box is being built; waiting for it", err=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _require_space() -> None:
    free = shutil.disk_usage(lab()).free
    if free < SPACE_TO_BUILD:
        raise LabError(
            f"{lab()} has {free >> 20} MiB free, and a box needs {SPACE_TO_BUILD >> 20} to be "
            "built; make room there, or let PEERCREDD_LAB name another folder"
        )


def _build(box: Box, folder: Path) -> None:
    root = folder / "root"
    log = folder / "log"
    mirror = os.environ.get("PEERCREDD_DEBIAN_MIRROR", MIRROR).rstrip("/")
    _run(
        log,
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        f"--architectures={recipe.ARCHITECTURE}",
        f"--include={','.join([*recipe.packages(box.kernel), box.kernel.package])}",
        *(f"--aptopt={line}" for line in _settings_of_apt()),
        "--dpkgopt=force-unsafe-io",
        box.kernel.suite,
        str(root),
        *recipe.sources(box.kernel, mirror),
        mend=f"see above whether this machine reaches {mirror}, or set PEERCREDD_DEBIAN_MIRROR, "
        "or http_proxy",
    )
    for path, text in recipe.FILES.items():
        file = root / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for command in recipe.COMMANDS:
        _run(log, "chroot", str(root), *command.split())
    # What starts the kernel wants these beside the disk.
    (vmlinuz,) = (root / "boot").glob("vmlinuz-*")
    (initrd,) = (root / "boot").glob("initrd.img-*")
    shutil.copyfile(vmlinuz, box.vmlinuz)
    shutil.copyfile(initrd, box.initrd)
    raw = folder / "disk.raw"
    disk.partition(raw, root, recipe.DISK_SIZE)
    _run(log, *disk.fill_command(raw, root, recipe.DISK_SIZE))
    _run(log, "qemu-img", "convert", "-O", "qcow2", str(raw), str(box.disk))
    log.rename(box.folder / "build.log")
    (box.folder / "box.json").write_bytes(msgspec.json.encode(_Facts(recipe.ARCHITECTURE)))


def _settings_of_apt() -> list[str]:
    """How this machine reaches its mirrors: a proxy, or a mirror that is old on purpose."""
    settings = subprocess.run(
        ["apt-config", "dump", "--no-empty", "--format", '%F "%v";%n', "Acquire"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [
        line
        for line in settings.stdout.splitlines()
        if line.startswith(("Acquire::http", "Acquire::Check-"))
    ]


def _run(log: Path, *command: str, mend: str = "what it said is above") -> None:
    # Should the lab be killed, nothing of the command outlives it: not a process, and not
    # a mount, which would make the folder impossible to remove.
    contained = ("setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--fork",
                 "--kill-child", "--", *command)  # fmt: skip
    # In a group of its own: Ctrl-C on a terminal is for the lab to handle.
    with (
        log.open("ab") as file,
        subprocess.Popen(
            contained,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        ) as process,
    ):
        assert process.stdout
        try:
            shutil.copyfileobj(process.stdout, file)
        except BaseException:
            process.kill()
            # Its processes are gone, and let the folder be removed, when none has the pipe.
            process.stdout.read()
            raise
    if process.returncode:
        raise LabError(f"{command[0]} failed; {mend}", tail(log))
