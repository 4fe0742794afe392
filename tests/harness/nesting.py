"""Actors in pid and user namespaces of their own, as containers have them."""

from __future__ import annotations

from collections.abc import Iterable

from harness import steps
from harness.actors import Actor
from harness.requirements import cannot_run
from harness.stage import Stage
from harness.steps import Extent
from harness.syscalls import CLONE_NEWPID, CLONE_NEWUSER

SHIFTED = (Extent(0, 100_000, 65_536),)
"""Ids of a container that shares none with the host."""
WITHIN = (Extent(0, 1_000, 40_000),)
"""Ids of a container in that container."""


def nest(
    stage: Stage,
    parent: Actor,
    uids: Iterable[Extent] = SHIFTED,
    gids: Iterable[Extent] = SHIFTED,
    kinds: int = CLONE_NEWPID | CLONE_NEWUSER,
) -> Actor:
    """A process in namespaces below those of `parent`, which has to be root in its own.

    It is the first one in the pid namespace, and in the user namespace root, so 0 has to be in
    the maps. Fork it for others; all end with it.
    """
    founder = stage.fork(parent)
    unshare(founder, kinds)
    if kinds & CLONE_NEWUSER:
        parent(steps.write_id_map, founder.pid, "uid_map", tuple(uids))
        parent(steps.write_id_map, founder.pid, "gid_map", tuple(gids))
    first = stage.fork(founder)
    first(steps.become, 0)
    # Its children's maps are files of theirs, that it has to open.
    first(steps.make_dumpable)
    return first


def give_subordinate_uids(helper: Actor, user: Actor, uid: int) -> None:
    """Put a process of that user in a user namespace of its own, as newuidmap(1) does.

    What is root there is the user, and 1 the first subordinate uid. `helper` is root.
    """
    unshare(user, CLONE_NEWUSER)
    for name in ("uid_map", "gid_map"):
        helper(steps.write_id_map, user.pid, name, (Extent(0, uid, 1), Extent(1, 300_000, 1_000)))


def unshare(actor: Actor, kinds: int) -> None:
    """Let a process leave for new namespaces, CLONE_NEW* of syscalls.py."""
    if not actor(steps.if_permitted, steps.unshare, kinds):
        cannot_run("a chroot can have no user namespaces: run the tests outside of it")
