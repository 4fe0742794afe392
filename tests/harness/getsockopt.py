"""Programs behind getsockopt(2) on a cgroup, ours and others', and what they make of it."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from harness.cgroup import Cgroup
from harness.so_peercred import NOBODY, Credentials
from peercredd.hooks import SO_PEERCRED
from peercredd.libbpf import attach_to_cgroup, check, library

ALONE, ALLOW_MULTI = 0, 2
"""Flags of bpf_prog_attach(): BPF_F_ALLOW_MULTI or none."""

_MOST_PROGRAMS = 64


def _assembled(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("=BBhi", *each) for each in instructions)


# In struct bpf_sockopt optval is at offset 8, optval_end at 16, the option at 28.
REFUSE_PRIORITY = _assembled(
    (0x61, 0x12, 28, 0),  # r2 = context->optname
    (0xB7, 0x00, 0, 1),  # r0 = 1
    (0x55, 0x02, 1, 12),  # if r2 != SO_PRIORITY skip one
    (0xB7, 0x00, 0, 0),  # r0 = 0
    (0x95, 0x00, 0, 0),  # return r0
)
"""SO_PRIORITY is refused, all else passes."""

OTHERS_PID = 4242
NAME_ANOTHER = _assembled(
    (0xB7, 0x00, 0, 1),  # r0 = 1
    (0x61, 0x12, 28, 0),  # r2 = context->optname
    (0x55, 0x02, 6, 17),  # if r2 != SO_PEERCRED skip all
    (0x79, 0x13, 8, 0),  # r3 = context->optval
    (0x79, 0x14, 16, 0),  # r4 = context->optval_end
    (0xBF, 0x35, 0, 0),  # r5 = r3
    (0x07, 0x05, 0, 4),  # r5 += 4
    (0x2D, 0x45, 1, 0),  # if r5 > r4 skip one
    (0x62, 0x03, 0, OTHERS_PID),  # *r3 = OTHERS_PID
    (0x95, 0x00, 0, 0),  # return r0
)
"""SO_PEERCRED is answered with a pid."""

_ASK = """
import json, os, socket, struct, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write("0")
with socket.create_server(("127.0.0.1", 0)) as listener:
    with socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with accepted:
            answer = [s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                      for s in (accepted, client)]
            try:
                accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)
            except PermissionError:
                refused = True
            else:
                refused = False
print(json.dumps([os.getpid(), [struct.unpack("=iII", each) for each in answer], refused]))
"""


class Answers(NamedTuple):
    """What a process that connects to itself over TCP is told."""

    knows_its_peers: bool
    """By SO_PEERCRED, at both ends: it is itself, or else nobody at all."""
    priority_is_refused: bool
    """By the other's program."""


class _LoadOptions(ctypes.Structure):
    # struct bpf_prog_load_opts of libbpf's bpf.h, up to its third member.
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
    )


def ask_in(cgroup: Cgroup) -> Answers:
    """Let a new process in a cgroup connect to itself and ask."""
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, cgroup.path], check=True, stdout=subprocess.PIPE, text=True
    )
    pid, answers, refused = json.loads(asked.stdout)
    found = {Credentials._make(answer) for answer in answers}
    assert found in ({Credentials(pid, 0, 0)}, {NOBODY}), f"process {pid} is told {answers}"
    return Answers(found != {NOBODY}, refused)


def attached(cgroup: Cgroup) -> int:
    """How many programs are attached to getsockopt(2) at a cgroup itself, whosever they are."""
    count = ctypes.c_uint32(_MOST_PROGRAMS)
    identities = (ctypes.c_uint32 * _MOST_PROGRAMS)()
    with _directory(cgroup) as directory:
        result = library().bpf_prog_query(
            directory, SO_PEERCRED.attach_type, 0, None, identities, ctypes.byref(count)
        )
    check(result, "list the programs of a cgroup")
    return count.value


@contextmanager
def others_program(instructions: bytes = REFUSE_PRIORITY) -> Iterator[int]:
    """Somebody else's program behind getsockopt(2), loaded."""
    options = _LoadOptions(ctypes.sizeof(_LoadOptions), 0, SO_PEERCRED.attach_type)
    program = library().bpf_prog_load(
        SO_PEERCRED.program_type,
        b"other",
        b"MIT",
        instructions,
        ctypes.c_size_t(len(instructions) // 8),
        ctypes.byref(options),
    )
    check(program, "load a program")
    try:
        yield program
    finally:
        os.close(program)


@contextmanager
def linked(program: int, cgroup: Cgroup) -> Iterator[None]:
    """A program attached by a link."""
    with _directory(cgroup) as directory:
        link = attach_to_cgroup(program, directory, SO_PEERCRED.attach_type)
    try:
        yield
    finally:
        os.close(link)


@contextmanager
def attached_by_flags(program: int, cgroup: Cgroup, flags: int) -> Iterator[None]:
    """A program attached by BPF_PROG_ATTACH."""
    kind = SO_PEERCRED.attach_type
    with _directory(cgroup) as directory:
        check(library().bpf_prog_attach(program, directory, kind, flags), "attach")
        try:
            yield
        finally:
            check(library().bpf_prog_detach2(program, directory, kind), "detach")


@contextmanager
def _directory(cgroup: Cgroup) -> Iterator[int]:
    directory = os.open(cgroup.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)
