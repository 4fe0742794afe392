"""``peercred lookup``: who is at the other end of one connection."""

from __future__ import annotations

import click

from peercred import Endpoint, InvalidArgument, Namespaces, NotFound
from peercred.cli.credentials import print_peer
from peercred.cli.parameters import cookie, endpoint, namespaces_of_process
from peercred.cli.settings import Settings, common_options, pass_settings

# What helps against each reason of NotFound.
HINTS = {
    "NEVER_SEEN": "LOCAL is the asking end's own address, a socket of another network namespace "
    "needs --netns-cookie, and only what `peercred status` calls the captured cgroup is recorded",
    "OLDER_THAN_CAPTURE": "let it connect again; if its listener is older, restart that first",
    "TABLE_WAS_FULL": "close connections, or raise the daemon's limits",
    "RETIRED": "ask while the socket is open",
    "NOT_LOCAL": "only connections within this host are recorded",
}

NEVER_SEEN_BY_COOKIE = (
    "the cookie is that of the asking end's own socket, and only what `peercred status` calls "
    "the captured cgroup is recorded"
)


class _Lookup(click.Command):
    def collect_usage_pieces(self, context: click.Context) -> list[str]:  # noqa: ARG002 - click's
        return [self.options_metavar or "", "[LOCAL REMOTE | --cookie N]"]


@click.command(
    cls=_Lookup,
    epilog="""\b
Examples:
  A server on port 8080 asks who its client on port 51000 is:
    peercred lookup 127.0.0.1:8080 127.0.0.1:51000
  The client asks who listens there:
    peercred lookup 127.0.0.1:51000 127.0.0.1:8080
  The same over IPv6, and only the number:
    peercred lookup [::1]:8080 [::1]:51000 --json | jq .uid
  By the cookie that getsockopt(SO_COOKIE) gives, surest of all:
    peercred lookup --cookie 4711
  In the numbers of the container that process 4321 is in:
    peercred lookup --as-seen-by 4321 --cookie 4711""",
)
@click.argument("local", type=endpoint, required=False, metavar="LOCAL")
@click.argument("remote", type=endpoint, required=False, metavar="REMOTE")
@click.option(
    "--cookie",
    "socket_cookie",
    type=cookie,
    metavar="N",
    help="SO_COOKIE of the asking end's socket.",
)
@click.option(
    "--netns-cookie",
    type=cookie,
    metavar="N",
    help="SO_NETNS_COOKIE of the asking end's socket.  [default: the daemon's own network]",
)
@click.option(
    "--as-seen-by",
    "namespaces",
    type=namespaces_of_process,
    metavar="PID",
    help="Answer in the numbers of that process's pid and user namespace.  "
    "[default: the initial ones]",
)
@common_options
@pass_settings
def lookup(
    settings: Settings,
    local: Endpoint | None,
    remote: Endpoint | None,
    socket_cookie: int | None,
    netns_cookie: int | None,
    namespaces: Namespaces | None,
) -> None:
    """Show the credentials of the other end of a connection.

    LOCAL and REMOTE are the connection's two addresses as the asking end sees
    them (getsockname and getpeername). They name the newest connection that
    has them; a socket cookie, given instead, names one connection for good.

    With --as-seen-by, pid and ids are those that a process in these namespaces
    would be told: pid 0 for a process that is not visible there, and the overflow
    id, usually 65534, for a user or group without a number there.

    The last rows tell who called accept() at the server's end. That is no part
    of the answer, and unknown where the hook set is "cgroup".

    With --json, "uid_name" and "gid_name" are looked up by this command now, if
    it is in the user namespace whose ids it shows; the rest is what the kernel
    recorded. Unknown is null. Who accepted is in "acceptor", and whose pids and
    ids all are, in "namespaces".
    """
    if socket_cookie is not None and local:
        raise click.UsageError("--cookie excludes LOCAL and REMOTE; give one or the other")
    if local and remote and local.address.version != remote.address.version:
        raise click.UsageError(f"{local} and {remote} differ in family; give two of one family")
    with settings.client() as client:
        try:
            if socket_cookie is not None:
                peer = client.lookup_cookie(socket_cookie, netns_cookie, namespaces=namespaces)
            elif local and remote:
                peer = client.lookup_tuple(local, remote, netns_cookie, namespaces=namespaces)
            else:
                raise click.UsageError(
                    "a connection has two ends; give LOCAL and REMOTE, or --cookie"
                )
        except NotFound as error:
            hint = HINTS.get(error.reason, "see `peercred status`")
            if error.reason == "NEVER_SEEN" and socket_cookie is not None:
                hint = NEVER_SEEN_BY_COOKIE
            raise NotFound(f"{error}; {hint}", error.reason) from error
        except InvalidArgument as error:
            if error.field == "key.netns_cookie" and socket_cookie is not None:
                raise InvalidArgument(
                    f"--netns-cookie: {netns_cookie} is not the network namespace of the socket "
                    "that --cookie names; leave it out",
                    error.field,
                ) from error
            raise
    print_peer(peer, as_json=settings.json)
