"""What is read of a record for speed is what the whole of it says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peercredd import records

HEAD = records.CONNECTION_HEAD.size
PRESENT = st.sampled_from((bytes(8), b"\1" + bytes(7)))


@given(PRESENT, PRESENT, PRESENT, st.binary(min_size=64, max_size=64))
def test_whose_a_connection_is_said_by_the_whole_record(
    established: bytes, listener_cookie: bytes, accepted: bytes, pattern: bytes
) -> None:
    data = bytearray((pattern * records.CONNECTION_SIZE)[: records.CONNECTION_SIZE])
    data[0:8] = established
    data[HEAD - 8 : HEAD] = listener_cookie
    at = records.CONNECTION_ACCEPTED_OFFSET
    data[at : at + 8] = accepted
    # Each end another uid, whatever the pattern.
    for number, offset in enumerate(
        (records.CLIENT_OFFSET, records.LISTENER_OFFSET, records.ACCEPTOR_OFFSET)
    ):
        data[offset + records.EUID_OFFSET] = number

    whole = records.connection(bytes(data))
    assert records.owners(bytes(data)) == (
        whole
        and (
            whole.client.euid,
            whole.listener.euid if whole.listener else None,
            whole.acceptor.euid if whole.acceptor else None,
        )
    )
