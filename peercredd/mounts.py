"""Where this mount namespace has the file systems that the capture needs."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from peercredd.libbpf import KernelError

MOUNTINFO = Path("/proc/self/mountinfo")
CGROUP_MOUNT = Path("/sys/fs/cgroup")
_ROOT_CGROUP_ID = 1
"""Inode number of the host's root cgroup (__kernfs_new_node() in fs/kernfs/dir.c)."""


class CgroupError(Exception):
    """There is no such cgroup v2 directory; the text says what to do."""


def mount_points(filesystem: str, mountinfo: Path = MOUNTINFO) -> list[Path]:
    """List where a file system of that type is mounted from its root, oldest first.

    A bind mount of one of its folders is left out: it does not show the whole. The
    format is that of proc_pid_mountinfo(5).
    """
    return [point for mounted, point in _whole_mounts(mountinfo) if mounted == filesystem]


def _whole_mounts(mountinfo: Path) -> Iterator[tuple[str, Path]]:
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        fields, _, source = line.partition(" - ")
        _, _, _, root, point, *_ = fields.split(" ")
        if root == "/":
            yield source.split(" ")[0], Path(_unescaped(point))


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def cgroup_directory(configured: str, mountinfo: Path = MOUNTINFO) -> Path:
    """Find the cgroup v2 directory that ``capture.cgroup`` names: a path, or "root".

    Raises:
        CgroupError: there is none.
    """
    roots = mount_points("cgroup2", mountinfo)
    if not roots:
        raise CgroupError(
            f"no cgroup v2 hierarchy is mounted; mount it: {_how_to_mount(mountinfo)}"
        )
    if configured == "root":
        return roots[0]
    path = Path(configured)
    if not path.is_dir():
        raise CgroupError(f"capture.cgroup: {path} is not a directory; make it or name another")
    if not (path / "cgroup.controllers").exists():
        raise CgroupError(
            f"capture.cgroup: {path} is no cgroup v2 directory; name one in {roots[0]}"
        )
    return path


def cgroup_level(directory: Path, mountinfo: Path = MOUNTINFO) -> int:
    """How many cgroups are above one; 0 for the host's root.

    Raises:
        KernelError: this process sees a part of the hierarchy only (cgroup_namespaces(7)).
    """
    for root in mount_points("cgroup2", mountinfo):
        if directory.is_relative_to(root) and root.stat().st_ino == _ROOT_CGROUP_ID:
            return len(directory.relative_to(root).parts)
    raise KernelError(
        errno.ENOENT,
        f"{directory} has no known place below the host's root cgroup; run peercredd outside of "
        "a cgroup namespace, with cgroup v2 mounted whole",
    )


def _how_to_mount(mountinfo: Path) -> str:
    # On a hybrid host the v1 controllers are mounted in a tmpfs there: keep them in sight.
    if ("tmpfs", CGROUP_MOUNT) in _whole_mounts(mountinfo):
        unified = CGROUP_MOUNT / "unified"
        return f"mkdir -p {unified} && mount -t cgroup2 none {unified}"
    return f"mount -t cgroup2 none {CGROUP_MOUNT}"
