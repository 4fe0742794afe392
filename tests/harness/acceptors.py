"""Who accepted a connection: the one thing that the hook sets tell differently of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # actors run without the project
    from peercred import PeerCredentials


class Acceptor(NamedTuple):
    """The task that accepted a connection."""

    pid: int
    uid: int


def acceptor_of(answer: PeerCredentials) -> Acceptor | None:
    """What the daemon says of who accepted."""
    acceptor = answer.acceptor
    return Acceptor(acceptor.pid, acceptor.uid) if acceptor else None


def told_acceptor(hook_set: str, pid: int, uid: int) -> Acceptor | None:
    """What it has to say, if that is who did: the `cgroup` hook set cannot see it."""
    return Acceptor(pid, uid) if hook_set == "trace" else None
