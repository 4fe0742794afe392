import contextlib
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peercred.v1 import peer_credentials_pb2 as pb
from peercredd.keys import Endpoints, InvalidKey, Key, parse
from peercredd.records import V4_MAPPED

LOOPBACK = V4_MAPPED + bytes([127, 0, 0, 1])


def endpoint(address: str = "127.0.0.1", port: int = 8080) -> pb.Endpoint:
    return pb.Endpoint(address=address, port=port)


def between(local: pb.Endpoint, remote: pb.Endpoint) -> pb.ConnectionKey:
    return pb.ConnectionKey(local=local, remote=remote)


def rejected(key: pb.ConnectionKey) -> InvalidKey:
    with pytest.raises(InvalidKey) as raised:
        parse(key)
    assert raised.value.reason == "INVALID_KEY"
    return raised.value


def test_a_cookie_alone_is_a_key() -> None:
    assert parse(pb.ConnectionKey(socket_cookie=2**64 - 1)) == Key(2**64 - 1, None, None)


def test_a_tuple_alone_is_a_key() -> None:
    key = parse(between(endpoint(port=1), endpoint(port=65535)))

    assert key == Key(None, None, Endpoints(LOOPBACK, 1, LOOPBACK, 65535))


def test_everything_at_once_is_a_key() -> None:
    message = between(endpoint(port=1), endpoint(port=2))
    message.socket_cookie = 3
    message.netns_cookie = 4

    assert parse(message) == Key(3, 4, Endpoints(LOOPBACK, 1, LOOPBACK, 2))


@pytest.mark.parametrize("text", ["127.0.0.1", "::ffff:127.0.0.1", "::FFFF:7f00:1"])
def test_ipv4_and_its_mapped_forms_are_one_address(text: str) -> None:
    key = parse(between(endpoint(text), endpoint("127.0.0.1")))

    assert key.endpoints is not None
    assert key.endpoints.local == key.endpoints.remote == LOOPBACK


def test_a_zone_is_accepted_and_dropped() -> None:
    with_zone = parse(between(endpoint("fe80::1%lo"), endpoint("::1")))

    assert with_zone == parse(between(endpoint("fe80::1"), endpoint("::1")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "127.1",
        "127.0.0.256",
        "127.0.0.1 ",
        "127.0.0.1%lo",
        "127.0.0.1\0",
        "0x7f000001",
        ":",
        ":::1",
        "[::1]",
        "::1%",
        "::1\0",
        "1::2::3",
        "::1/128",
        "١٢٧.0.0.1",
    ],
)
@pytest.mark.parametrize("end", ["local", "remote"])
def test_a_malformed_address_is_rejected_with_its_field(text: str, end: str) -> None:
    wrong, right = endpoint(text), endpoint("::1" if ":" in text else "127.0.0.1")
    key = between(wrong, right) if end == "local" else between(right, wrong)

    assert rejected(key).field == f"{end}.address"


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "::",
        "::ffff:0.0.0.0",
        "224.0.0.1",
        "239.255.255.255",
        "::ffff:224.0.0.1",
        "ff02::1",
        "255.255.255.255",
    ],
)
def test_an_address_that_no_connection_has_is_rejected(text: str) -> None:
    peer = endpoint("::1" if text in ("::", "ff02::1") else "127.0.0.1")

    assert rejected(between(endpoint(text), peer)).field == "local.address"
    assert rejected(between(peer, endpoint(text))).field == "remote.address"


@pytest.mark.parametrize("port", [0, 65536, 2**32 - 1])
def test_a_port_out_of_range_is_rejected_with_its_field(port: int) -> None:
    assert rejected(between(endpoint(port=port), endpoint())).field == "local.port"
    assert rejected(between(endpoint(), endpoint(port=port))).field == "remote.port"


@pytest.mark.parametrize("ipv4", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_two_families_are_rejected(ipv4: str) -> None:
    assert rejected(between(endpoint(ipv4), endpoint("::1"))).field == "remote.address"
    assert rejected(between(endpoint("::1"), endpoint(ipv4))).field == "remote.address"


def test_one_end_alone_is_rejected_naming_the_one_that_is_missing() -> None:
    assert rejected(pb.ConnectionKey(local=endpoint())).field == "remote"
    assert rejected(pb.ConnectionKey(remote=endpoint())).field == "local"
    assert rejected(pb.ConnectionKey(socket_cookie=1, local=endpoint())).field == "remote"


@pytest.mark.parametrize("key", [pb.ConnectionKey(), pb.ConnectionKey(netns_cookie=1)])
def test_a_key_that_names_nothing_is_rejected_as_a_whole(key: pb.ConnectionKey) -> None:
    assert rejected(key).field == ""


def test_a_cookie_of_zero_is_not_a_missing_cookie() -> None:
    tuple_too = between(endpoint(), endpoint())
    tuple_too.socket_cookie = 0
    assert rejected(tuple_too).field == "socket_cookie"

    tuple_too.socket_cookie = 1
    tuple_too.netns_cookie = 0
    assert rejected(tuple_too).field == "netns_cookie"


def test_what_is_said_of_a_huge_address_is_short_and_one_line() -> None:
    text = rejected(between(endpoint("9\n" * 100_000), endpoint())).text

    assert len(text) < 300
    assert "\n" not in text


@given(st.text(), st.integers(0, 2**32 - 1))
def test_no_text_and_no_port_does_anything_but_parse_or_be_rejected(text: str, port: int) -> None:
    with contextlib.suppress(InvalidKey):
        parse(between(endpoint(text, port), endpoint()))
        assert 0 < port < 65536


@given(st.binary(min_size=16, max_size=16), st.integers(1, 65535))
def test_every_address_of_a_connection_is_read_as_the_kernel_writes_it(
    address: bytes, port: int
) -> None:
    address = b"\x20" + address[1:]
    text = socket.inet_ntop(socket.AF_INET6, address)

    key = parse(between(endpoint(text, port), endpoint(text, port)))

    assert key.endpoints == Endpoints(address, port, address, port)
