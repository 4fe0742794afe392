"""Names of users and groups, looked up now: comfort for people, not part of what was recorded."""

from __future__ import annotations

import grp
import pwd
from functools import cache


@cache
def user_name(uid: int) -> str | None:
    """Name of `uid` on this host, None where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


@cache
def group_name(gid: int) -> str | None:
    """Name of `gid` on this host, None where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None
