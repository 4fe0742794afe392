"""Where a scenario plays: its actors and namespaces, and the questions asked of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

from harness import oracle, so_peercred, steps
from harness.acceptors import Acceptor, acceptor_of, told_acceptor
from harness.actors import Actor, Origin
from harness.channel import Descriptor
from harness.daemon import LOOK_SECONDS, Client, occupancy, wait_until_empty
from harness.netns import NetworkNamespace
from harness.patience import patient
from harness.routes import V4
from harness.so_peercred import Peer
from harness.steps import Address, Addresses, Both, Option, Route
from peercred import PeerCredentials

SWEEP_SECONDS = patient(30)

Connect = Callable[[Both[int], Addresses], None]


@dataclass(frozen=True)
class Listener:
    """A place to connect to, on both transports."""

    fds: Both[int]
    addresses: Addresses
    route: Route


class Stage:
    """One scenario. At its end every actor is gone, and so has to be every record.

    Where others are captured too, it is not `alone`, and nothing can be said of that.
    """

    def __init__(self, origin: Origin, client: Client, alone: bool = True) -> None:
        self.client = client
        self._alone = alone
        self._origin = origin
        self._exit = ExitStack()
        self._before = occupancy(client)
        self.place: NetworkNamespace | None = None
        """Where its actors are, if nothing else is said: one of its own for ports used again."""

    @cached_property
    def hook_set(self) -> str:
        """Which one the daemon uses."""
        return self.client.status().hook_set

    def actor(
        self,
        uid: int = 0,
        gid: int | None = None,
        groups: Iterable[int] = (),
        namespace: NetworkNamespace | None = None,
    ) -> Actor:
        """A new process; root unless a uid is given, with the gid of that number."""
        actor = self.keep(self._origin.actor())
        if place := namespace or self.place:
            actor(steps.enter_network_namespace, Descriptor(place.fd))
        if uid:
            actor(steps.become, uid, gid, tuple(groups))
        return actor

    def keep(self, actor: Actor) -> Actor:
        """End an actor that another one has forked with all the others."""
        self._exit.enter_context(closing(actor))
        return actor

    def fork(self, actor: Actor) -> Actor:
        """A child of an actor."""
        return self.keep(actor.fork())

    def namespace(self) -> NetworkNamespace:
        """A new network namespace."""
        return self._exit.enter_context(NetworkNamespace())

    def listen(
        self,
        server: Actor,
        route: Route,
        backlog: int = 128,
        port: int = 0,
        options: Iterable[Option] = (),
    ) -> Listener:
        """Let an actor listen on both transports."""
        fds = server(steps.bind, route, port, tuple(options))
        server(steps.listen, fds, backlog)
        return Listener(fds, server(steps.addresses, fds, route), route)

    def connect(
        self,
        client: Actor,
        listener: Listener,
        how: Connect = steps.connect,
        local: Address | None = None,
        options: Iterable[Option] = (),
    ) -> Both[int]:
        """Let an actor connect on both transports."""
        fds = client(steps.sockets, listener.route, local, tuple(options))
        client(how, fds, listener.addresses)
        return fds

    def peer(self, actor: Actor, ends: Both[int]) -> Peer:
        """Who is at the other end of an actor's sockets: one answer of two transports."""
        with actor.borrow(ends.unix) as unix, actor.borrow(ends.tcp) as tcp:
            return oracle.same_peer(self.client, Both(unix, tcp))

    def answer(self, actor: Actor, fd: int) -> PeerCredentials:
        """All that is known of the other end of an actor's TCP socket."""
        with actor.borrow(fd) as sock:
            return oracle.tcp_answer(self.client, sock)

    def acceptor(self, actor: Actor, fd: int) -> Acceptor | None:
        """Who accepted, as an actor at either end is told."""
        return acceptor_of(self.answer(actor, fd))

    def told(self, acceptor: Actor, uid: int) -> Acceptor | None:
        """What they have to be told, if that is who accepted."""
        return told_acceptor(self.hook_set, acceptor.pid, uid)

    def refusal(self, actor: Actor, fd: int) -> str:
        """Why nobody is known at the other end of an actor's TCP socket."""
        with actor.borrow(fd) as sock:
            assert so_peercred.tcp_peer(sock) == (so_peercred.NOBODY, None)
            return oracle.refusal(self.client, sock)

    def wait_until_empty(self) -> None:
        """Wait until no record is left of this scenario."""
        wait_until_empty(self.client, but=self._before)

    def wait_for_sweep(self) -> None:
        """Wait until what was there before has been swept: see `swept_stage`."""
        server, client = self.actor(), self.actor()
        fds = self.connect(client, self.listen(server, V4, options=(steps.DEFER_ACCEPT,)))
        client(steps.reset, fds.tcp)
        deadline = time.monotonic() + SWEEP_SECONDS
        while occupancy(self.client)["pending"] > self._before["pending"]:
            assert time.monotonic() < deadline, "nothing is swept"
            time.sleep(LOOK_SECONDS)

    def assert_empty(self) -> None:
        """No record of this scenario is there at this moment."""
        assert occupancy(self.client) == self._before

    def close(self) -> None:
        """End all actors, and wait until no record is left of them."""
        self._exit.close()
        if self._alone:
            self.wait_until_empty()

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What a failed scenario leaves says nothing more.
        if error:
            self._exit.close()
        else:
            self.close()
