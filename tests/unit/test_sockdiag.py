import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from peercredd import sockdiag
from peercredd.records import V4_MAPPED

SO_COOKIE = 57


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")


def address(name: tuple[str, int]) -> bytes:
    packed = ip_address(name[0]).packed
    return packed if len(packed) == 16 else V4_MAPPED + packed


def listener(stack: ExitStack, host: str = "127.0.0.1", backlog: int = 128) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return stack.enter_context(
        socket.create_server((host, 0), family=family, backlog=backlog, dualstack_ipv6=host == "::")
    )


def connection(
    stack: ExitStack, server: socket.socket, host: str = "127.0.0.1"
) -> tuple[socket.socket, socket.socket]:
    client = stack.enter_context(socket.create_connection((host, server.getsockname()[1])))
    accepted, _ = server.accept()
    return client, stack.enter_context(accepted)


@pytest.mark.parametrize(
    ("bound", "destination"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("::", "::1")],
)
def test_both_ends_are_listed_by_cookie_and_addresses(
    stack: ExitStack, bound: str, destination: str
) -> None:
    ends = connection(stack, listener(stack, bound), destination)
    listed = {each.cookie: each for each in sockdiag.sockets()}
    for end in ends:
        local, remote = end.getsockname(), end.getpeername()
        assert listed[cookie(end)] == sockdiag.Socket(
            cookie=cookie(end),
            local_address=address(local),
            remote_address=address(remote),
            local_port=local[1],
            remote_port=remote[1],
        )


def test_a_socket_nobody_asked_for_its_cookie_has_the_one_it_is_listed_with(
    stack: ExitStack,
) -> None:
    client, _ = connection(stack, listener(stack))
    ports = client.getsockname()[1], client.getpeername()[1]
    (listed,) = (
        each.cookie
        for each in sockdiag.sockets()
        if (each.local_port, each.remote_port) == ports
        and each.local_address == address(client.getsockname())
    )
    assert listed == cookie(client)


def test_half_closed_connections_are_alive(stack: ExitStack) -> None:
    client, accepted = connection(stack, listener(stack))
    client.shutdown(socket.SHUT_WR)
    assert accepted.recv(1) == b""
    listed = {each.cookie for each in sockdiag.sockets()}
    assert {cookie(client), cookie(accepted)} <= listed


def test_a_connect_nobody_has_answered_is_alive(stack: ExitStack) -> None:
    server = listener(stack, backlog=0)
    connection_waiting = stack.enter_context(socket.create_connection(server.getsockname()))
    client = stack.enter_context(socket.socket())
    client.setblocking(False)
    assert client.connect_ex(server.getsockname()) == errno.EINPROGRESS
    listed = {each.cookie for each in sockdiag.sockets()}
    assert {cookie(client), cookie(connection_waiting)} <= listed


def test_listeners_and_what_is_in_time_wait_are_not_listed(stack: ExitStack) -> None:
    server = listener(stack)
    client, accepted = connection(stack, server)
    cookies = {cookie(client), cookie(server)}
    client.shutdown(socket.SHUT_WR)
    assert accepted.recv(1) == b""
    accepted.close()
    assert client.recv(1) == b""  # its FIN came second: a TIME_WAIT stands for it now
    listed = {each.cookie for each in sockdiag.sockets()}
    assert not listed & cookies


def test_a_list_longer_than_one_message_is_whole(stack: ExitStack) -> None:
    server = listener(stack)
    expected = {cookie(end) for _ in range(400) for end in connection(stack, server)}
    listed = [each.cookie for each in sockdiag.sockets()]
    assert expected <= set(listed)


def test_a_cookie_beyond_32_bits_is_whole() -> None:
    # struct inet_diag_msg: nobody opens four billion sockets to see one.
    answer = struct.pack("=Bxxx", socket.AF_INET) + struct.pack(">HH", 80, 40000)
    answer += bytes(36) + struct.pack("=II", 0x89ABCDEF, 0x01234567)
    assert sockdiag._decode(answer, 0).cookie == 0x0123456789ABCDEF


@pytest.mark.parametrize(
    ("family", "protocol", "number"),
    [(socket.AF_INET, 200, errno.ENOENT), (255, socket.IPPROTO_TCP, errno.EINVAL)],
)
def test_a_kernel_that_does_not_tell_is_an_error(family: int, protocol: int, number: int) -> None:
    with pytest.raises(OSError, match="sock_diag does not list") as raised:
        list(sockdiag._dump(family, protocol))
    assert raised.value.errno == number
