"""The hook sets: which programs each has, and where in the kernel they go."""

from __future__ import annotations

import errno
from typing import NamedTuple

from peercredd.btf import KernelTypes, Prototype
from peercredd.libbpf import (
    BPF_PROG_TYPE_TRACING,
    KernelError,
    attach_to_cgroup,
    attach_to_function,
    find_function,
    load_program,
)

_FENTRY, _FEXIT = 24, 25  # enum bpf_attach_type


class Program(NamedTuple):
    """A BPF program on a cgroup, and its place there (enum bpf_attach_type)."""

    name: str
    program_type: int
    attach_type: int

    def load(self, code: bytes) -> int:
        """Have the kernel verify the program; its descriptor.

        Raises:
            Rejected: the verifier does not take it.
        """
        return load_program(self.name, code, self.program_type, self.attach_type)

    def attach(self, program: int, cgroup: int) -> int:
        """Attach the loaded program to an open cgroup directory; a link's descriptor."""
        return attach_to_cgroup(program, cgroup, self.attach_type)


class Traced(NamedTuple):
    """A BPF program at a function of the kernel, and what it reads there."""

    name: str
    """Of the function."""
    parameters: tuple[str, ...] = ()
    """As C declares them."""
    result: str | None = None
    """Its type, for a program that runs when the function returns."""
    on_every_path: bool = True
    """Whether each connection passes through."""

    def load(self, code: bytes) -> int:
        """Have the kernel verify the program; its descriptor.

        Raises:
            Rejected: the verifier does not take it.
            KernelError: there is no such function.
        """
        place = _FEXIT if self.result else _FENTRY
        function = find_function(self.name, place)
        return load_program(self.name, code, BPF_PROG_TYPE_TRACING, place, function)

    def attach(self, program: int, _: int) -> int:
        """Attach the loaded program, wherever the capture is bounded; a link's descriptor."""
        return attach_to_function(program, self.name)


# Retire comes first and establish last: what is recorded can be retired. Numbers of
# include/uapi/linux/bpf.h.
_CGROUP = (
    Program("cgroup_sock_release", 9, 34),
    Program("cgroup_connect4", 18, 10),
    Program("cgroup_connect6", 18, 11),
    Program("cgroup_sock_ops", 13, 3),
)

_TRACE = (
    Traced("tcp_close", ("struct sock *sk",)),
    Traced("tcp_set_state", ("struct sock *sk", "int state")),
    Traced("inet_csk_listen_start", ("struct sock *sk",)),
    Traced("tcp_v4_connect", ("struct sock *sk",)),
    Traced("tcp_v6_connect", ("struct sock *sk",)),
    Traced("tcp_connect", ("struct sock *sk",)),
    Traced("inet_csk_accept", result="struct sock *"),
    Traced("tcp_init_transfer", ("struct sock *sk", "int bpf_op")),
    Traced(
        "inet_csk_reqsk_queue_add",
        ("struct request_sock *req", "struct sock *child"),
        on_every_path=False,
    ),
    Traced("inet_csk_complete_hashdance", ("struct sock *child", "bool own_req")),
)


PROGRAMS: dict[str, tuple[Program | Traced, ...]] = {"trace": _TRACE, "cgroup": _CGROUP}
"""Of each hook set, in the order to attach them in."""

SO_PEERCRED = Program("so_peercred_getsockopt", 25, 21)
"""Of every hook set, and attached by nobody unless that is asked for."""

HOOK_SETS = tuple(PROGRAMS)
"""By preference."""


def unused(hook_set: str, why: str) -> dict[str, str]:
    """Why the hook sets are not in use that are not that one."""
    return {name: why for name in HOOK_SETS if name != hook_set}


def context_macros(types: KernelTypes) -> list[str]:
    """Compiler flags that say where in a program's context each argument and result is.

    Raises:
        KernelError: a function is not there, or is not what it was. The text names it.
    """
    return [
        flag for traced in _TRACE for flag in argument_macros(traced, types.prototype(traced.name))
    ]


def argument_macros(traced: Traced, prototype: Prototype) -> list[str]:
    """The same of one program. Raises KernelError likewise."""
    function, there = traced.name, prototype.parameters
    declared = [f"{kind}{'' if kind.endswith('*') else ' '}{name}" for kind, name in there]
    for wanted in traced.parameters:
        if wanted not in declared:
            raise KernelError(
                errno.ENOSYS,
                f"this kernel's {function}({', '.join(declared)}) has no parameter '{wanted}'",
            )
    if traced.result and traced.result != prototype.result:
        raise KernelError(
            errno.ENOSYS,
            f"this kernel's {function} gives '{prototype.result}', not '{traced.result}'",
        )
    flags = [
        f"-DARGUMENT_{function}_{there[position][1]}={position}"
        for position in map(declared.index, traced.parameters)
    ]
    return [*flags, f"-DRESULT_{function}={len(there)}"] if traced.result else flags
