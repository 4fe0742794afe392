import time
from datetime import UTC, datetime, timedelta

import pytest

from harness.memory_view import LOOPBACK, MemoryView, connection, credentials
from peercred.v1 import peer_credentials_pb2 as pb
from peercredd import encode
from peercredd.records import (
    HAS_AUDIT_SESSION_ID,
    HAS_CAPABILITIES,
    HAS_CGROUP_ID,
    HAS_LOGIN_UID,
    HAS_NETWORK_NAMESPACE,
    HAS_NO_NEW_PRIVS,
    HAS_PID_NAMESPACE,
    HAS_START_TIME,
    HAS_USER_NAMESPACE,
    NO_NEW_PRIVS,
    UNSET_ID,
    Connection,
    Credentials,
)
from peercredd.store import Attachment


def encoded(record: Credentials) -> pb.Credentials:
    message = pb.Credentials()
    encode.credentials(message, record)
    return message


def encoded_connection(record: Connection) -> pb.Connection:
    message = pb.Connection()
    encode.connection(message, record)
    return message


def test_every_field_has_the_value_of_its_own_record_field() -> None:
    assert encoded(credentials(uid=1000, groups=(4, 24))) == pb.Credentials(
        pid=101,
        tid=102,
        uid=1000,
        gid=1003,
        real_uid=1001,
        real_gid=1002,
        saved_uid=1004,
        saved_gid=1005,
        filesystem_uid=1006,
        filesystem_gid=1007,
        groups=[4, 24],
        group_count=2,
        groups_truncated=False,
        process_start_time_ns=8_000_000_002,
        comm=b"client",
        effective_capabilities=1 << 40 | 3,
        no_new_privs=False,
        login_uid=1008,
        audit_session_id=77,
        cgroup_id=4242,
        pid_namespace=4026531836,
        user_namespace=4026531837,
        network_namespace=4026531840,
        time_ns=9_000_000_001,
    )


def test_root_is_a_number_that_is_there() -> None:
    root = encoded(credentials()._replace(euid=0, egid=0))

    assert root.HasField("uid")
    assert root.HasField("gid")
    assert (root.uid, root.gid) == (0, 0)


@pytest.mark.parametrize(
    ("bit", "fields"),
    [
        (HAS_NO_NEW_PRIVS, {"no_new_privs"}),
        (HAS_LOGIN_UID, {"login_uid"}),
        (HAS_AUDIT_SESSION_ID, {"audit_session_id"}),
        (HAS_CGROUP_ID, {"cgroup_id"}),
        (HAS_PID_NAMESPACE, {"pid_namespace"}),
        (HAS_USER_NAMESPACE, {"user_namespace"}),
        (HAS_NETWORK_NAMESPACE, {"network_namespace"}),
        (HAS_START_TIME, {"process_start_time_ns"}),
        (HAS_CAPABILITIES, {"effective_capabilities"}),
    ],
)
def test_what_the_kernel_does_not_provide_is_absent_and_nothing_else(
    bit: int, fields: set[str]
) -> None:
    whole = credentials()
    without = encoded(whole._replace(known=whole.known & ~bit))

    absent = {field.name for field, _ in encoded(whole).ListFields()} - {
        field.name for field, _ in without.ListFields()
    }
    assert absent == fields


def test_an_audit_id_that_was_never_set_is_absent() -> None:
    record = credentials()._replace(login_uid=UNSET_ID, audit_session_id=UNSET_ID)
    assert not encoded(record).HasField("login_uid")
    assert not encoded(record).HasField("audit_session_id")

    record = credentials()._replace(login_uid=0, audit_session_id=0)
    assert encoded(record).HasField("login_uid")
    assert encoded(record).HasField("audit_session_id")


def test_no_new_privs_is_told_from_unknown() -> None:
    record = credentials()

    assert encoded(record._replace(known=record.known | NO_NEW_PRIVS)).no_new_privs is True
    assert encoded(record).HasField("no_new_privs")


@pytest.mark.parametrize(("count", "held", "truncated"), [(0, 0, False), (32, 32, False)])
def test_groups_are_as_many_as_there_are(count: int, held: int, truncated: bool) -> None:
    message = encoded(credentials(groups=range(100, 100 + count)))

    assert list(message.groups) == list(range(100, 100 + held))
    assert message.HasField("group_count")
    assert message.group_count == count
    assert message.groups_truncated is truncated


def test_more_groups_than_are_recorded_are_said_to_be_truncated() -> None:
    message = encoded(credentials(groups=range(100, 165)))

    assert list(message.groups) == list(range(100, 132))
    assert message.group_count == 65
    assert message.groups_truncated


def test_both_ends_of_a_connection_are_kept_apart() -> None:
    message = encoded_connection(connection(10, client_port=50000, server_port=8080))

    assert message.server_socket_cookie == 10
    assert message.client_socket_cookie == 1_000_010
    assert message.listener_socket_cookie == 30
    assert message.netns_cookie == 1
    assert message.client_endpoint == pb.Endpoint(address="127.0.0.1", port=50000)
    assert message.server_endpoint == pb.Endpoint(address="127.0.0.1", port=8080)
    assert message.established_time_ns == 9_000_000_003
    assert message.client.uid == 1000
    assert message.listener.uid == 2000


def test_a_listener_older_than_the_capture_is_absent() -> None:
    message = encoded_connection(connection(listener_cookie=0))

    assert not message.HasField("listener")
    assert not message.HasField("listener_socket_cookie")


def test_the_acceptor_is_kept_apart_from_both_ends() -> None:
    message = encoded_connection(connection(acceptor_uid=0))

    assert (message.client.uid, message.listener.uid, message.acceptor.uid) == (1000, 2000, 0)


def test_what_nobody_was_seen_to_accept_has_no_acceptor() -> None:
    message = encoded_connection(connection(acceptor_uid=None))

    assert not message.HasField("acceptor")


@pytest.mark.parametrize(
    ("run_count", "missed_count", "figures"),
    [
        (None, None, {}),
        (0, 0, {"run_count": 0, "missed_count": 0}),
        (2**64 - 1, None, {"run_count": 2**64 - 1}),
        (None, 7, {"missed_count": 7}),
    ],
)
def test_a_figure_that_the_kernel_does_not_give_is_absent_and_none_is_a_figure(
    run_count: int | None, missed_count: int | None, figures: dict[str, int]
) -> None:
    message = pb.GetStatusResponse.Attachment()
    encode.attachment(message, "tcp_connect", Attachment(True, run_count, missed_count))

    fields = {field.name: value for field, value in message.ListFields()}
    assert fields == {"program": "tcp_connect", "attached": True, **figures}


@pytest.mark.parametrize(
    ("address", "text"),
    [(LOOPBACK, "127.0.0.1"), (bytes(15) + b"\1", "::1"), (b"\xfe\x80" + bytes(14), "fe80::")],
)
def test_addresses_are_text_and_mapped_ones_are_ipv4(address: bytes, text: str) -> None:
    assert encoded_connection(connection(address=address)).server_endpoint.address == text


def test_the_start_of_capture_is_given_in_time_of_day_too() -> None:
    message = pb.GetStatusResponse()
    encode.capture(message, MemoryView().status())

    assert message.capture_start_time_ns == 5_000_000_000
    boot = datetime.now(UTC) - timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))
    start = message.capture_start_time.ToDatetime(UTC)
    assert abs(start - boot - timedelta(seconds=5)) < timedelta(seconds=1)
