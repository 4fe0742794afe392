"""The BPF programs that are attached in the kernel, whoever attached them."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from harness.patience import patient
from peercredd.libbpf import KernelError, Map, check, library, link_cgroup_id, program_of

DETACH_SECONDS = patient(10)
_MOST_MAPS = 64


class _ProgramInfo(ctypes.Structure):
    # struct bpf_prog_info of include/uapi/linux/bpf.h, up to its map_ids.
    _fields_ = (
        ("left_out", ctypes.c_uint64 * 6),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
    )


def attached(table_size: int) -> int:
    """How many programs are attached of captures that have a table of that size.

    That is those that use such a table, and those that use a map in common with them.
    """
    others = [_map_sizes(program) for program in _attached_programs()]
    own: list[dict[int, int]] = []
    maps: set[int] = set()
    while found := [
        each for each in others if table_size in each.values() or not maps.isdisjoint(each)
    ]:
        own += found
        others = [each for each in others if each not in found]
        maps.update(*found)
    return len(own)


def wait_until_attached(table_size: int, count: int) -> None:
    """Wait until that many are; raises AssertionError.

    What the kernel attaches no more it may take down some moments later (RCU).
    """
    deadline = time.monotonic() + DETACH_SECONDS
    while (found := attached(table_size)) != count:
        assert time.monotonic() < deadline, f"{found} programs are attached, not {count}"
        os.sched_yield()


def _attached_programs() -> Iterator[int]:
    bpf = library()
    identity = ctypes.c_uint32(0)
    while not bpf.bpf_link_get_next_id(identity, ctypes.byref(identity)):
        with _unless_gone(), _opened(bpf.bpf_link_get_fd_by_id(identity)) as link:
            if link_cgroup_id(link) != 0:
                with _opened(program_of(link)) as program:
                    yield program


def _map_sizes(program: int) -> dict[int, int]:
    """How many entries each map that a program uses may have, by the map's number."""
    bpf = library()
    identities = (ctypes.c_uint32 * _MOST_MAPS)()
    info = _ProgramInfo(nr_map_ids=_MOST_MAPS, map_ids=ctypes.addressof(identities))
    size = ctypes.c_uint32(ctypes.sizeof(info))
    check(
        bpf.bpf_obj_get_info_by_fd(program, ctypes.byref(info), ctypes.byref(size)),
        "read the state of a program",
    )
    sizes = {}
    for identity in identities[: info.nr_map_ids]:
        with _unless_gone(), _opened(bpf.bpf_map_get_fd_by_id(identity)) as table:
            sizes[identity] = Map(table).max_entries
    return sizes


@contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    check(descriptor, "open by its number")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _unless_gone() -> Iterator[None]:
    """Pass over what goes, or is not whole yet, while it is looked at."""
    try:
        yield
    except KernelError as error:
        # EAGAIN: the link has its number, and somebody is still attaching it.
        if error.errno not in (errno.ENOENT, errno.EAGAIN):
            raise
