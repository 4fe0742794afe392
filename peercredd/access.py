"""Who may learn what: the policy, and the view of a caller who learns about its own only.

Nothing that such a caller is told may depend on a connection that is not its own, neither by
what is said nor by the work it took. So all ways not to be found are one, NOT_VISIBLE, and what
a search took less than the longest possible one is made up for.
"""

from __future__ import annotations

import grp
import pwd
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, Protocol, Self

import structlog

from peercredd import records
from peercredd.records import (
    HAS_PID_NAMESPACE,
    HAS_USER_NAMESPACE,
    WITHHELD,
    Connection,
    Credentials,
)
from peercredd.store import Answer, Attachment, Reason, Sighting, StoreStatus

ROOT: Final = 0

_MOST_CALLERS_COUNTED: Final = 1024
_MOST_CALLERS_LOGGED: Final = 8

_PROBLEM: Final = "something is wrong with peercredd; who administers it sees what in its log"

log = structlog.get_logger()


class AccessError(Exception):
    """The policy cannot be had. One line: which option, what is wrong, what mends it."""


class Transport(Enum):
    """How a question reaches the daemon."""

    UNIX_SOCKET = "unix socket"
    LOOPBACK_TCP = "loopback TCP"


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may learn, and why."""

    transport: Transport
    sees_all: bool
    why: str
    """One line for people."""
    listener_details: bool
    """Whether clients learn more of others' listeners than a unix socket would tell."""
    caller: Credentials | None = None
    """None on the unix socket, where gRPC does not tell."""

    def may_name(self, field: str, namespace: int) -> bool:
        """Whether an answer may be in the numbers of that namespace; `field` is as in Namespaces.

        Which other namespaces there are is not the business of who sees only its own.
        """
        if self.sees_all or self.caller is None:
            return True
        known, own = {
            "pid_namespace": (HAS_PID_NAMESPACE, self.caller.pid_namespace),
            "user_namespace": (HAS_USER_NAMESPACE, self.caller.user_namespace),
        }[field]
        return bool(self.caller.known & known) and namespace == own


ON_UNIX_SOCKET: Final = Access(
    Transport.UNIX_SOCKET, True, "the socket's permissions let you connect", True
)


class Refused(Enum):
    """What callers on loopback TCP do not get. The values are the API's reasons."""

    NOT_VISIBLE = "NOT_VISIBLE"
    CALLER_UNKNOWN = "CALLER_UNKNOWN"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    TOO_MANY_CONNECTIONS = "TOO_MANY_CONNECTIONS"
    """No error's reason: they are closed."""
    TOO_MUCH_SENT = "TOO_MUCH_SENT"
    """Likewise."""

    @property
    def description(self) -> str:
        """What it means, for people."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS: Final = {
    Refused.NOT_VISIBLE: "lookups of connections that are not the caller's",
    Refused.CALLER_UNKNOWN: "calls over connections of which there is no record",
    Refused.TOO_MANY_CALLS: "calls of users who had as many under way as one may have",
    Refused.TOO_MANY_CONNECTIONS: "connections, closed, of users who had as many as one may have",
    Refused.TOO_MUCH_SENT: "connections, closed, over which came what is no call, while the server "
    "had too much in memory",
}


class Refusals:
    """What was refused since the start, and to whom since it was logged last.

    Counting costs the same whether something was refused or not; logging is left for later.
    That keeps callers from telling the two apart, and from filling the log.
    """

    def __init__(self) -> None:
        self.counts: Counter[Refused] = Counter()
        self._unlogged: Counter[tuple[Refused, int | None]] = Counter()

    def count(self, what: Refused, uid: int | None, times: int = 1) -> None:
        """Count `times`, which may be 0, for a caller; None for one that is not known."""
        self.counts[what] += times
        key = what, uid
        if key not in self._unlogged and len(self._unlogged) >= _MOST_CALLERS_COUNTED:
            key = what, None
        self._unlogged[key] += times

    def write_log(self) -> None:
        """Log what was refused since the last time: a few lines, however much it was."""
        unlogged, self._unlogged = +self._unlogged, Counter()
        ranked = unlogged.most_common()
        for (what, uid), times in ranked[:_MOST_CALLERS_LOGGED]:
            who = {} if uid is None else {"uid": uid}
            log.warning(f"refused: {what.description}", reason=what.value, times=times, **who)
        if rest := ranked[_MOST_CALLERS_LOGGED:]:
            log.warning(
                "refused, to others besides",
                callers=len(rest),
                times=sum(times for _, times in rest),
            )


@dataclass(frozen=True, slots=True)
class Policy:
    """Who learns about every connection, and what the others are told of listeners."""

    users: Mapping[int, str]
    """Uid to why."""
    groups: Mapping[int, str]
    """Gid to why."""
    listener_details: bool = False

    @classmethod
    def of(
        cls,
        service_group: str,
        users: Iterable[str],
        groups: Iterable[str],
        *,
        listener_details: bool,
    ) -> Self:
        """Look up the names that the configuration has.

        A service's group that does not exist has no members; the unix socket's warning says so.

        Raises:
            AccessError: there is no such user or group.
        """
        uids = {ROOT: "you are root"}
        for user in users:
            uids.setdefault(_uid(user), f"you are the user {user} of access.users")
        gids = {}
        for group in groups:
            gids[_gid(group)] = f"you are in the group {group} of access.groups"
        with suppress(KeyError):
            gids[grp.getgrnam(service_group).gr_gid] = f"you are in the group {service_group}"
        return cls(uids, gids, listener_details)

    def access(self, caller: Credentials) -> Access:
        """What the task that made the connection to the daemon may ask over it."""
        why = self.users.get(caller.euid)
        if why is None:
            # Of a task in many groups only the first are recorded. In the others it is no member.
            for gid in (caller.egid, *records.groups(caller)):
                if why := self.groups.get(gid):
                    break
        return Access(
            Transport.LOOPBACK_TCP,
            why is not None,
            why or "you are neither root nor in a group that sees all",
            why is not None or self.listener_details,
            caller,
        )


class Source(Protocol):
    """What the view of a limited caller is made from: the Store."""

    @property
    def own_netns_cookie(self) -> int:
        """Of the network namespace that a tuple without one is looked for in."""

    def sight_by_socket(self, cookie: int) -> Sighting:
        """Find a socket's whole connection."""

    def sight_by_tuple(
        self, netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
    ) -> Sighting:
        """Find the newest connection between two endpoints, whole."""

    def spend(self, sighting: Sighting, present: int) -> None:
        """Make up for what a sighting took less than the longest one."""

    def pages(self, size: int) -> Iterator[Iterable[Connection]]:
        """Yield all connections, about so many at a time."""

    def status(self, *, everything: bool = True) -> StoreStatus:
        """Return what the capture says of itself, or only what tells of nobody it captures."""

    def is_attached(self) -> bool:
        """Return whether every program is in its place now."""

    def problems(self) -> list[str]:
        """Return what keeps answers from being complete now."""

    def attachments(self) -> dict[str, Attachment]:
        """Return for each program whether it is in its place now, and how often it ran."""


class Caller(NamedTuple):
    """Whose view it is."""

    uid: int
    """Effective, at connect()."""
    server_socket_cookie: int
    """Of the daemon's socket that the caller asks over."""


class OwnView:
    """The connections of one uid.

    At the server's end a connection is of the uid of its listener, and of its acceptor; at
    the client's end it is of the uid that called connect(), which learns who listens, and no
    more: who accepted is a matter of the server's.
    """

    def __init__(
        self, source: Source, caller: Caller, refusals: Refusals, *, listener_details: bool
    ) -> None:
        self._source = source
        self._caller = caller
        self._refusals = refusals
        self._listener_details = listener_details

    @property
    def own_netns_cookie(self) -> int:
        """Of the network namespace that a tuple without one is looked for in."""
        return self._source.own_netns_cookie

    def find_by_socket(self, cookie: int) -> Answer | Reason:
        """Find the other end of a socket's connection, if it is the caller's."""
        return self._answer(self._source.sight_by_socket(cookie))

    def find_by_tuple(
        self, netns_cookie: int, local: bytes, local_port: int, remote: bytes, remote_port: int
    ) -> Answer | Reason:
        """Find the other end of the newest connection between two endpoints, likewise."""
        return self._answer(
            self._source.sight_by_tuple(netns_cookie, local, local_port, remote, remote_port)
        )

    def pages(self, size: int) -> Iterator[Iterator[Connection]]:
        """Yield the connections whose server is the caller's, at most about so many at a time."""
        for page in self._source.pages(size):
            yield filter(None, map(self.shown, page))

    def shown(self, connection: Connection) -> Connection | None:
        """Return a connection as the caller may see it, None if its server is not the caller's."""
        if not self._serves(connection):
            return None
        if connection.listener is None:
            return connection
        return connection._replace(listener=self._shown(connection.listener))

    def status(self) -> StoreStatus:
        """Return what tells of the capture, and of nobody whom it captures."""
        return self._source.status(everything=False)

    def is_attached(self) -> bool:
        """Return whether every program is in its place now."""
        return self._source.is_attached()

    def problems(self) -> list[str]:
        """Return that something is wrong, and not what: that names cgroups and limits."""
        return [_PROBLEM] if self._source.problems() else []

    def attachments(self) -> dict[str, Attachment]:
        """Return for each program whether it is in its place now, and not how often it ran."""
        return {
            name: Attachment(state.attached, None, None)
            for name, state in self._source.attachments().items()
        }

    def _answer(self, sighting: Sighting) -> Answer | Reason:
        uid, owners = self._caller.uid, sighting.owners()
        client, listener, acceptor = owners or (None, None, None)
        serves = uid in (listener, acceptor)
        connected = uid == client and listener is not None
        if serves if sighting.asker_is_server else connected:
            answer = sighting.answer()
            # Nothing else was found for the one who asks: whose it is has told so.
            assert isinstance(answer, Answer)
            if sighting.asker_is_server:
                return answer
            return answer._replace(
                peer=self._shown(answer.peer), acceptor=answer.acceptor if serves else None
            )
        self._source.spend(sighting, self._caller.server_socket_cookie)
        self._refusals.count(Refused.NOT_VISIBLE, uid, int(owners is not None))
        return Reason.NOT_VISIBLE

    def _serves(self, connection: Connection) -> bool:
        ends = (connection.listener, connection.acceptor)
        return any(end is not None and end.euid == self._caller.uid for end in ends)

    def _shown(self, listener: Credentials) -> Credentials:
        if self._listener_details or listener.euid == self._caller.uid:
            return listener
        return listener._replace(known=listener.known | WITHHELD)


def _uid(user: str) -> int:
    return _number("users", user, "passwd", lambda: pwd.getpwnam(user).pw_uid)


def _gid(group: str) -> int:
    return _number("groups", group, "group", lambda: grp.getgrnam(group).gr_gid)


def _number(option: str, text: str, database: str, by_name: Callable[[], int]) -> int:
    if text.isascii() and text.isdecimal():
        number = int(text)
        if number < records.UNSET_ID:
            return number
    try:
        return by_name()
    except KeyError:
        raise AccessError(
            f"access.{option}: there is no {option[:-1]} {text!r}; create it, or take it out of "
            f"the configuration (`getent {database}` lists the names)"
        ) from None
