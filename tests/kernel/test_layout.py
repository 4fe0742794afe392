"""What user space decodes is what BCC compiled, byte for byte."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from peercredd import capture, compiler, libbpf, records
from peercredd.btf import KernelTypes

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def compiled(hook_set: str) -> Any:
    source = capture.source(hook_set)
    return compiler.compiled_by_bcc(source.text, source.flags, capture.source_folder())


def offsets(layout: struct.Struct) -> Iterator[int]:
    """Where each value that `layout` unpacks begins."""
    offset = 0
    for count, code in re.findall(r"(\d*)([QIHisx?])", layout.format.removeprefix("=")):
        if code in "sx":
            if code == "s":
                yield offset
            offset += int(count or 1)
            continue
        for _ in range(int(count or 1)):
            yield offset
            offset += struct.calcsize(code)


def members(kind: type[ctypes.Structure]) -> dict[str, int]:
    return {
        name: getattr(kind, name).offset for name, *_ in kind._fields_ if not name.startswith("pad")
    }


def test_credentials_are_decoded_where_they_are_written(compiled: Any) -> None:
    leaf = dict(compiled[b"pending"].Leaf._fields_)["client"]

    assert members(leaf) == dict(
        zip(records.Credentials._fields, offsets(records.CREDENTIALS), strict=True)
    )
    assert ctypes.sizeof(leaf) == records.CREDENTIALS.size


def test_tuples_are_packed_as_the_kernel_side_packs_them(compiled: Any) -> None:
    key = compiled[b"by_tuple"].Key

    assert members(key) == dict(zip(records.Tuple._fields, offsets(records.TUPLE), strict=True))
    assert ctypes.sizeof(key) == records.TUPLE.size


def test_pending_connects_are_decoded_where_they_are_written(compiled: Any) -> None:
    leaf = compiled[b"pending"].Leaf
    names = ("published_ns", "client_cookie", "initial_sequence", "client_gone")

    assert members(leaf) == {
        **dict(zip(names, offsets(records.PENDING_HEAD), strict=True)),
        "client": records.PENDING_HEAD.size,
    }
    assert ctypes.sizeof(leaf) == records.PENDING_SIZE


def test_connections_are_decoded_where_they_are_written(compiled: Any) -> None:
    leaf = compiled[b"connections"].Leaf
    head = ("established_ns", "server_cookie", "client_cookie", "listener_cookie")
    happened = (
        "ends_gone",
        "closed_with_descriptor",
        "closed_in_queue",
        "server_gone",
        "client_closed_with_descriptor",
        "left",
    )
    kernels_own = {"client_asked"}
    ends = records.CONNECTION_ENDS_OFFSET

    found = {name: at for name, at in members(leaf).items() if name not in kernels_own}
    assert found == {
        **dict(zip(head, offsets(records.CONNECTION_HEAD), strict=True)),
        "tuple": records.CONNECTION_TUPLE_OFFSET,
        **dict(zip(happened, (ends + at for at in offsets(records.CONNECTION_ENDS)), strict=True)),
        "accepted_ns": records.CONNECTION_ACCEPTED_OFFSET,
        "client": records.CLIENT_OFFSET,
        "listener": records.LISTENER_OFFSET,
        "acceptor": records.ACCEPTOR_OFFSET,
    }
    assert ctypes.sizeof(leaf) == records.CONNECTION_SIZE


def test_what_a_user_holds_is_decoded_where_it_is_counted(compiled: Any) -> None:
    for name in (b"users", b"users_over"):
        leaf = compiled[name].Leaf

        assert members(leaf) == dict(
            zip(records.Holdings._fields, offsets(records.USER), strict=True)
        )
        assert ctypes.sizeof(leaf) == records.USER.size
        assert ctypes.sizeof(compiled[name].Key) == records.UID.size
    for name in (b"left", b"left_over"):
        assert members(compiled[name].Key) == dict(
            zip(("client_uid", "listener_uid"), offsets(records.PAIR), strict=True)
        )
        assert ctypes.sizeof(compiled[name].Leaf) == records.LEFT.size


def test_settings_are_packed_as_they_are_read(compiled: Any) -> None:
    leaf = compiled[b"settings"].Leaf

    assert list(members(leaf).values()) == list(offsets(records.SETTINGS))
    assert ctypes.sizeof(leaf) == records.SETTINGS.size


def test_there_is_a_counter_for_each_reason_to_drop_a_record(compiled: Any) -> None:
    source = (capture.source_folder() / "records.h").read_text()
    enum = re.search(r"enum drop \{(.+?)\};", source, re.DOTALL)
    assert enum
    names = re.findall(r"DROP_(\w+)", enum[1])

    assert names == ["NONE", *(name for name, _ in records.DROPS), "COUNT"]
    assert len(compiled[b"drops"]) == len(names) - 1


def test_constants_are_the_same_on_both_sides() -> None:
    source = (capture.source_folder() / "records.h").read_text()
    constants = {
        name: int(value, 0) << int(shift or "0")
        for name, value, shift in re.findall(
            r"#define (\w+) \(?(\d+)U?(?:LL)?(?: << (\d+)\))?", source
        )
    }

    here = {name: getattr(records, name) for name in constants if hasattr(records, name)}
    assert here == {name: constants[name] for name in here}
    assert {"MAX_GROUPS", "ABSENCE_SLOTS", "NO_NEW_PRIVS"} <= here.keys()
    assert {name for name in constants if name.startswith("HAS_")} <= here.keys(), (
        "each HAS_ bit is known here"
    )
    assert {
        constants[f"ABSENT_{name}"] for name in ("RETIRED", "TABLE_WAS_FULL", "NOT_RECORDED")
    } == set(records.ABSENCES)


@pytest.mark.parametrize(
    ("structure", "paths"),
    [
        (
            libbpf._ProgramInfo,
            {
                "type": "bpf_prog_info.type",
                "id": "bpf_prog_info.id",
                "run_time_ns": "bpf_prog_info.run_time_ns",
                "run_count": "bpf_prog_info.run_cnt",
                "recursion_misses": "bpf_prog_info.recursion_misses",
            },
        ),
        (
            libbpf._LinkInfo,
            {
                "type": "bpf_link_info.type",
                "program_id": "bpf_link_info.prog_id",
                "cgroup_id": "bpf_link_info.cgroup.cgroup_id",
            },
        ),
        (
            libbpf._MapInfo,
            {
                "type": "bpf_map_info.type",
                "value_size": "bpf_map_info.value_size",
                "max_entries": "bpf_map_info.max_entries",
                "types_id": "bpf_map_info.btf_id",
                "value_type": "bpf_map_info.btf_value_type_id",
            },
        ),
    ],
)
def test_what_the_kernel_tells_of_its_objects_is_read_where_it_writes_it(
    structure: type[ctypes.Structure], paths: dict[str, str]
) -> None:
    types = KernelTypes()
    there = {name: types.member(path).offset for name, path in paths.items()}
    assert {name: members(structure)[name] for name in paths} == there
