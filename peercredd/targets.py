"""Targets of SO_PEERCRED on TCP: what may be named, and which cgroup that is now."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from peercredd.mounts import mount_points

ALL: Final = "all"
"""Every cgroup that the capture covers."""

PATTERN: Final = (
    r"\A(all|/[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*"
    r"|[A-Za-z0-9:_.\\@-]*[A-Za-z0-9:_.\\-]\.(service|socket|slice|scope))\Z"
)
"""A unit is named as systemd.unit(5) allows; ``name@.service`` alone is none yet."""

ALLOWED: Final = '"all", the absolute path of a cgroup, or a unit such as postgresql.service'

_SYSTEMD_RUNS: Final = Path("/run/systemd/system")
"""As sd_booted(3) tells."""

_PROPERTIES: Final = ("LoadState", "ControlGroup", "Id", "Slice")

_SYSTEMCTL_SECONDS: Final = 30
"""It answers in milliseconds, and late only while the host boots."""

_FILEID_KERNFS: Final = 0xFE
"""Type of a handle that is a cgroup's number (include/linux/exportfs.h)."""


class TargetError(Exception):
    """A target means no cgroup, or one that is not captured. One line."""


class NotKnownNow(TargetError):  # noqa: N818 - names a state
    """systemd does not say where a unit is; that may pass."""


class Place(NamedTuple):
    """The cgroup that a target means."""

    directory: Path
    """Where it is, or will be."""
    absence: str
    """What to say where there is no such directory: why, and what mends it."""


def is_valid(target: str) -> bool:
    """Whether that can be a target at all."""
    return re.fullmatch(PATTERN, target) is not None


def locate(target: str, covered: Path) -> Place:
    """Find the cgroup of a valid target; it need not exist yet.

    Args:
        target: see `ALLOWED`.
        covered: the cgroup directory that bounds the capture.

    Raises:
        NotKnownNow: only systemd could tell, and it does not answer.
        TargetError: it is no cgroup, or not in `covered`.
    """
    if target == ALL:
        return Place(covered, f"{covered} is gone; restart the daemon")
    if target.startswith("/"):
        # What a symbolic link leads to: that is where a cgroup comes and goes.
        directory = Path(os.path.realpath(target))
        absence = "there is no such cgroup; make it, or name it in the configuration to wait for it"
    else:
        directory, absence = _unit(target)
    if not directory.is_relative_to(os.path.realpath(covered)):
        what = target if target.startswith("/") else f"{target} ({directory})"
        raise TargetError(
            f"{what} is outside of the captured cgroup {covered}; name one in it, or have the "
            "daemon capture more with --cgroup"
        )
    if os.path.lexists(directory) and not is_cgroup(directory):
        raise TargetError(f"{target} is no cgroup v2 directory; name one in {covered}")
    return Place(directory, absence)


def running_units(beginning: str) -> list[str]:
    """The units whose names begin so, as far as systemd tells."""
    kinds = "--type=service,socket,slice,scope"
    command = ["systemctl", "list-units", "--plain", "--no-legend", kinds, f"{beginning}*"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    return [line.split()[0] for line in listed.splitlines()]


def is_cgroup(directory: Path) -> bool:
    """Whether a cgroup v2 is there now."""
    # Path.exists() raises where the path is too long.
    return os.path.exists(directory / "cgroup.controllers")  # noqa: PTH110


def cgroup_of(number: int, hierarchy: Path) -> Path | None:
    """The directory of the cgroup with that inode number; None when it is gone.

    Args:
        number: as in st_ino, and in the kernel's cgroup ids.
        hierarchy: any directory of cgroup v2.

    Raises:
        OSError: `hierarchy` is gone, or this process may not open by number.
    """
    # struct file_handle: length, type, and then the number.
    handle = struct.pack("=IiQ", 8, _FILEID_KERNFS, number)
    mount = os.open(hierarchy, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        found = libc.open_by_handle_at(mount, handle, os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(mount)
    if found < 0:
        failure = ctypes.get_errno()
        if failure != errno.ESTALE:
            raise OSError(failure, f"open a cgroup by its number: {os.strerror(failure)}")
        return None
    try:
        return Path(f"/proc/self/fd/{found}").readlink()
    finally:
        os.close(found)


def _unit(name: str) -> tuple[Path, str]:
    if not _SYSTEMD_RUNS.is_dir():
        raise TargetError(f"{name}: systemd does not run here; name the path of a cgroup instead")
    shown = _properties(name)
    directory = unit_directory(shown, mount_points("cgroup2")[0])
    if shown["LoadState"] == "not-found":
        return directory, "systemd knows no such unit; `systemctl list-units --all` shows them"
    return directory, (
        f"it does not run; `systemctl start {name}`, or name it in the configuration to wait for it"
    )


def unit_directory(shown: Mapping[str, str], hierarchy: Path) -> Path:
    """Where the cgroup of a unit is; of one that does not run, where systemd will make it.

    Args:
        shown: what ``systemctl show`` says of ControlGroup, Id and Slice.
        hierarchy: where systemd has cgroup v2 mounted.
    """
    if group := shown["ControlGroup"]:
        return hierarchy / group.lstrip("/")
    unit = shown["Id"]
    if unit.endswith(".slice"):
        return hierarchy / _slice(unit)
    # One that is not loaded has no slice yet; systemd.slice(5) tells the default.
    return hierarchy / _slice(shown["Slice"] or "system.slice") / unit


def _slice(name: str) -> Path:
    """A slice's place: ``a-b.slice`` is in ``a.slice``, and ``-.slice`` the root."""
    parts = [part for part in name.removesuffix(".slice").split("-") if part]
    return Path(*(f"{'-'.join(parts[:depth])}.slice" for depth in range(1, len(parts) + 1)))


def _properties(unit: str) -> dict[str, str]:
    command = ["systemctl", "show", f"--property={','.join(_PROPERTIES)}", "--", unit]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SYSTEMCTL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotKnownNow(
            f"{unit}: systemctl cannot be asked: {error}; see whether it works"
        ) from error
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if done.returncode or not shown.keys() >= set(_PROPERTIES):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise NotKnownNow(f"{unit}: systemctl says: {said}; mend that, or name the cgroup's path")
    return shown
