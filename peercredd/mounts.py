"""Where this mount namespace has the file systems that the capture needs."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")


class CgroupError(Exception):
    """There is no such cgroup v2 directory; the text says what to do."""


def mount_points(filesystem: str, mountinfo: Path = MOUNTINFO) -> list[Path]:
    """List where a file system of that type is mounted from its root, oldest first.

    A bind mount of one of its folders is left out: it does not show the whole. The
    format is that of proc_pid_mountinfo(5).
    """
    points = []
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        fields, _, source = line.partition(" - ")
        _, _, _, root, point, *_ = fields.split(" ")
        if source.split(" ")[0] == filesystem and root == "/":
            points.append(Path(_unescaped(point)))
    return points


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
            "no cgroup v2 hierarchy is mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup"
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
