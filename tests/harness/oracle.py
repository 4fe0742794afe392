"""The same question asked of AF_UNIX and of the daemon; the answers have to be equal."""

from __future__ import annotations

import contextlib
import socket
import struct

import grpc
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import ErrorInfo

import peercred
from harness import so_peercred
from harness.so_peercred import MAX_GROUPS, Peer
from harness.steps import IPPROTO_MPTCP, Both
from peercred import Basis, InvalidArgument, NotFound, PeerCredentials
from peercred.v1 import peer_credentials_pb2 as pb
from peercred.v1 import peer_credentials_pb2_grpc as rpc

SO_COOKIE = 57
SO_NETNS_COOKIE = 71


def as_peer(answer: PeerCredentials) -> Peer:
    """What the daemon says, in the same terms."""
    assert answer.group_count is not None
    assert answer.groups_truncated == (answer.group_count > MAX_GROUPS)
    return Peer(answer.pid, answer.uid, answer.gid, answer.groups, answer.group_count)


def cookie(sock: socket.socket, option: int = SO_COOKIE) -> int:
    """SO_COOKIE of a socket, or another option of that shape."""
    (value,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, option, 8))
    return int(value)


def tcp_answer(client: peercred.Client, sock: socket.socket) -> PeerCredentials:
    """Ask the daemon in every way there is; raises what `lookup` raises.

    All ways have to agree: only the tuple of a socket that has none any more, and the
    cookie of a multipath socket, are not asked.
    """
    answer = client.lookup(sock)
    multipath = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == IPPROTO_MPTCP
    if not multipath:
        assert answer.basis is Basis.SOCKET
        assert client.lookup_cookie(cookie(sock)) == answer
        assert cookie(sock) in (answer.server_socket_cookie, answer.client_socket_cookie)
    assert answer.netns_cookie == cookie(sock, SO_NETNS_COOKIE)
    with contextlib.suppress(OSError):
        by_tuple = client.lookup_tuple(
            sock.getsockname(), sock.getpeername(), cookie(sock, SO_NETNS_COOKIE)
        )
        assert by_tuple.basis is Basis.TUPLE
        assert as_peer(by_tuple) == as_peer(answer)
    return answer


def same_peer(client: peercred.Client, sockets: Both[socket.socket]) -> Peer:
    """Ask both transports and return their one answer; raises AssertionError if it is two."""
    expected = so_peercred.peer(sockets.unix)
    found = as_peer(tcp_answer(client, sockets.tcp))
    assert found == expected, f"TCP says {found}, AF_UNIX says {expected}"
    assert so_peercred.tcp_peer(sockets.tcp) == so_peercred.as_told_by_tcp(expected)
    return found


def ask_raw(address: str, key: pb.ConnectionKey) -> pb.LookupResponse:
    """Ask with a key that the client library would not send; raises NotFound with its reason.

    Raises AssertionError for any other refusal.
    """
    with grpc.insecure_channel(address) as channel:
        results = rpc.PeerCredentialsStub(channel).BatchLookup(pb.BatchLookupRequest(keys=[key]))
    (result,) = results.results
    if result.HasField("found"):
        return result.found
    info = ErrorInfo()
    assert result.error.details[0].Unpack(info)
    assert result.error.code == code_pb2.NOT_FOUND, result.error.message
    raise NotFound(result.error.message, info.reason)


def refusal(client: peercred.Client, sock: socket.socket) -> str:
    """Why there is no answer for a socket: the reason; raises AssertionError if there is one."""
    try:
        answer = client.lookup(sock)
    except NotFound as error:
        return error.reason
    except InvalidArgument:
        return "INVALID_ARGUMENT"
    raise AssertionError(f"nobody should be known there, but: {answer}")
