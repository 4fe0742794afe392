"""The BPF programs of a hook set: made for the running kernel without its headers, and loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from peercredd import hooks, records
from peercredd.btf import FunctionMissing, KernelTypes, MemberMissing
from peercredd.compiled import KERNEL_FUNCTIONS, Cache, Compiled
from peercredd.compiler import Refused, compile_programs, version
from peercredd.libbpf import KernelError, Map, Rejected, can_trace
from peercredd.mounts import cgroup_level

REQUIRED = {
    "sock_family": "sock.__sk_common.skc_family",
    "sock_rcv_saddr": "sock.__sk_common.skc_rcv_saddr",
    "sock_daddr": "sock.__sk_common.skc_daddr",
    "sock_v6_rcv_saddr": "sock.__sk_common.skc_v6_rcv_saddr",
    "sock_v6_daddr": "sock.__sk_common.skc_v6_daddr",
    "sock_num": "sock.__sk_common.skc_num",
    "sock_dport": "sock.__sk_common.skc_dport",
    "sock_net": "sock.__sk_common.skc_net.net",
    "sock_cookie": "sock.__sk_common.skc_cookie",
    "sock_dst_cache": "sock.sk_dst_cache",
    "sock_socket": "sock.sk_socket",
    "sock_err": "sock.sk_err",
    "sock_flags": "sock.__sk_common.skc_flags",
    "tcp_write_seq": "tcp_sock.write_seq",
    "tcp_rcv_nxt": "tcp_sock.rcv_nxt",
    "tcp_snd_una": "tcp_sock.snd_una",
    "dst_dev": "dst_entry.dev",
    "net_device_flags": "net_device.flags",
    "net_cookie": "net.net_cookie",
    "task_cred": "task_struct.cred",
    "task_tgid": "task_struct.tgid",
    "task_pid": "task_struct.pid",
    "task_comm": "task_struct.comm",
    "task_flags": "task_struct.flags",
    "task_group_leader": "task_struct.group_leader",
    "cred_uid": "cred.uid",
    "cred_gid": "cred.gid",
    "cred_suid": "cred.suid",
    "cred_sgid": "cred.sgid",
    "cred_euid": "cred.euid",
    "cred_egid": "cred.egid",
    "cred_fsuid": "cred.fsuid",
    "cred_fsgid": "cred.fsgid",
    "cred_group_info": "cred.group_info",
    "group_info_ngroups": "group_info.ngroups",
    "group_info_gid": "group_info.gid",
}
"""What no answer can do without: macro name to member. An absent one is an error."""

REQUIRED_OF = {
    "cgroup": {},
    "trace": {
        "sock_state": "sock.__sk_common.skc_state",
        "tcp_fastopen_rsk": "tcp_sock.fastopen_rsk",
        "request_listener": "request_sock.__req_common.skc_listener",
    },
}
"""What one hook set needs besides."""

REQUIRED_BY_BOUNDS = {
    "sock_cgroup": "sock.sk_cgrp_data.cgroup",
    "cgroup_level": "cgroup.level",
    "cgroup_ancestors": "cgroup.ancestors",
    "cgroup_kn": "cgroup.kn",
    "kernfs_node_id": "kernfs_node.id",
}
"""What `trace` needs besides to tell one cgroup's sockets from others."""

BITFIELDS = {
    "tcp_fastopen_connect": "tcp_sock.fastopen_connect",
    "tcp_is_mptcp": "tcp_sock.is_mptcp",
    "tcp_syn_data": "tcp_sock.syn_data",
}
"""Required too; the compiler gets a byte offset and a mask."""

OPTIONAL = {
    "process_start_time_ns": {"task_start_boottime": "task_struct.start_boottime"},
    "effective_capabilities": {"cred_cap_effective": "cred.cap_effective"},
    "no_new_privs": {"task_atomic_flags": "task_struct.atomic_flags"},
    "login_uid": {"task_loginuid": "task_struct.loginuid"},
    "audit_session_id": {"task_sessionid": "task_struct.sessionid"},
    "cgroup_id": {
        "task_cgroups": "task_struct.cgroups",
        "css_set_dfl_cgrp": "css_set.dfl_cgrp",
        "cgroup_kn": "cgroup.kn",
        "kernfs_node_id": "kernfs_node.id",
    },
    "pid_namespace": {
        "task_thread_pid": "task_struct.thread_pid",
        "pid_level": "pid.level",
        "pid_numbers": "pid.numbers",
        "upid_ns": "upid.ns",
        "upid_nr": "upid.nr",
        "pid_namespace_inum": "pid_namespace.ns.inum",
    },
    "user_namespace": {
        "cred_user_ns": "cred.user_ns",
        "user_namespace_inum": "user_namespace.ns.inum",
    },
    "network_namespace": {
        "task_nsproxy": "task_struct.nsproxy",
        "nsproxy_net_ns": "nsproxy.net_ns",
        "net_inum": "net.ns.inum",
    },
}
"""Fields of the API's Credentials that a kernel may lack, and what each needs."""

USER_NAMESPACES = {
    "cred_user_ns": "cred.user_ns",
    "user_namespace_level": "user_namespace.level",
    "user_namespace_parent": "user_namespace.parent",
    "user_namespace_owner": "user_namespace.owner",
    "user_namespace_uid_map": "user_namespace.uid_map",
    "id_map_count": "uid_gid_map.nr_extents",
    "id_map_extent": "uid_gid_map.extent",
    "id_map_forward": "uid_gid_map.forward",
    "id_map_lower_first": "uid_gid_extent.lower_first",
}
"""What tells who is behind a user namespace; a kernel that lacks them charges each uid there."""

SO_PEERCRED = {
    "sockopt_sk": "bpf_sockopt_kern.sk",
    **OPTIONAL["process_start_time_ns"],
    **OPTIONAL["pid_namespace"],
    **OPTIONAL["user_namespace"],
    "pid_namespace_reaper": "pid_namespace.child_reaper",
    "user_namespace_level": "user_namespace.level",
    "user_namespace_uid_map": "user_namespace.uid_map",
    "user_namespace_gid_map": "user_namespace.gid_map",
    "id_map_count": "uid_gid_map.nr_extents",
    "id_map_extent": "uid_gid_map.extent",
    "id_map_reverse": "uid_gid_map.reverse",
}
"""What the program behind getsockopt() needs besides."""

MPTCP = {"mptcp_first": "mptcp_sock.first"}
"""What it needs to answer for MPTCP sockets; a kernel without them lacks it."""

MAPS = (
    "pending",
    "connections",
    "by_tuple",
    "by_client",
    "reset_in_queue",
    "users",
    "users_over",
    "left",
    "left_over",
    "absences",
    "older",
    "drops",
    "totals",
    "watched",
    "events",
    "about",
    "generation",
    "server_sockets",
    "connecting",
)
"""The maps that outlive the loader, by their names in bpf/maps.h."""

_AS_MANY_AS_CONNECTIONS = ("connections", "by_tuple", "by_client", "reset_in_queue", "older")

REASON_LENGTH = 500
"""Characters, of a reason that has to fit into `records.ABOUT_SIZE`."""

_UNLIMITED = 2**31 - 1


class Capture(NamedTuple):
    """Loaded programs and their maps, by file descriptor, and the fields this kernel lacks."""

    programs: dict[hooks.Program | hooks.Traced, int]
    """In the order to attach them in."""
    maps: dict[str, int]
    missing_fields: tuple[str, ...]
    so_peercred: int | None
    """The program that answers getsockopt(), to be attached where that is asked for."""
    why_no_so_peercred: str
    """One line; empty where there is one."""
    from_cache: bool
    """Whether it had been compiled before."""


def source_folder() -> Path:
    """The BPF sources: beside this module in an installed package, else the tree's bpf/.

    Raises:
        KernelError: neither is there.
    """
    here = Path(__file__).parent
    for folder in (here / "bpf", here.parent / "bpf"):
        if (folder / "core.h").exists():
            return folder
    raise KernelError(errno.ENOENT, f"the BPF sources are missing from {here}; reinstall peercredd")


def member_macros(
    types: KernelTypes, required: dict[str, str]
) -> tuple[list[str], tuple[str, ...]]:
    """Compiler flags that define every offset, and the optional fields that are missing.

    Raises:
        MemberMissing: a required member is not in this kernel.
    """
    flags = [f"-DOFFSET_{macro}={types.member(path).offset}" for macro, path in required.items()]
    for macro, path in BITFIELDS.items():
        member = types.member(path)
        flags += [f"-DOFFSET_{macro}={member.offset}", f"-DMASK_{macro}={1 << member.bit}"]
    missing = []
    for field, members in OPTIONAL.items():
        try:
            flags += [
                f"-DOFFSET_{macro}={types.member(path).offset}" for macro, path in members.items()
            ]
        except MemberMissing:
            missing.append(field)
    with suppress(MemberMissing):
        flags += [
            f"-DOFFSET_{macro}={types.member(path).offset}"
            for macro, path in USER_NAMESPACES.items()
        ]
    flags.append(f"-DSIZE_upid={types.size('upid')}")
    return flags, tuple(missing)


def header_flags() -> list[str]:
    """Compiler flags that find the UAPI headers; BCC switches the usual folders off.

    Raises:
        KernelError: they are not installed.
    """
    machine = os.uname().machine
    for folder in (*Path("/usr/include").glob(f"{machine}-linux-*"), Path("/usr/include")):
        if (folder / "asm" / "types.h").exists() and Path("/usr/include/linux/types.h").exists():
            return ["-isystem", "/usr/include", "-isystem", str(folder)]
    raise KernelError(
        errno.ENOENT,
        "the kernel's user-space headers are missing; install the package linux-libc-dev",
    )


def source_text(sources: Path, name: str) -> str:
    """A source file with the files beside it that it includes put in their place.

    BCC turns map accesses into helper calls in the main file only.
    """
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((sources / name).read_text().splitlines(), 1):
        if included := re.fullmatch(r'#include "(.+)"', line):
            lines += [source_text(sources, included[1]), f'#line {number + 1} "{name}"']
        else:
            lines.append(line)
    return "\n".join(lines)


def layout(max_connections: int, max_pending: int) -> str:
    """Tells captures apart of which one cannot go on with the maps of the other."""
    digest = hashlib.sha256(f"{max_connections} {max_pending}".encode())
    for name in ("records.h", "maps.h"):
        text = (source_folder() / name).read_text()
        digest.update("".join(re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL).split()).encode())
    return digest.hexdigest()


class Running(NamedTuple):
    """What is taken over of a running capture."""

    maps: Path
    """The folder where they are pinned."""
    generation: int
    """Of the new programs: they record once the map of that name has this number."""


class Source(NamedTuple):
    """What is compiled for the running kernel."""

    text: str
    flags: list[str]
    """Of the compiler."""
    programs: tuple[hooks.Program | hooks.Traced, ...]
    missing_fields: tuple[str, ...]
    why_no_so_peercred: str
    """One line; empty where that program is among them."""


def source(hook_set: str, *, bounded: bool = False) -> Source:
    """The source of a hook set; with `trace`, of one `bounded` to a cgroup, or not.

    Raises:
        KernelError: headers are missing, or the kernel lacks something that is needed.
    """
    required = REQUIRED | REQUIRED_OF[hook_set]
    types = KernelTypes()
    flags: list[str] = []
    if hook_set == "trace":
        if not can_trace():
            raise KernelError(errno.ENOSYS, "this kernel takes no tracing programs (fentry)")
        flags += hooks.context_macros(types)
        if bounded:
            required |= REQUIRED_BY_BOUNDS
    offsets, missing = member_macros(types, required)
    so_peercred_flags, why_not = _so_peercred_macros(types)
    folder = source_folder()
    flags += so_peercred_flags
    flags += [*offsets, *header_flags(), f"-I{folder}", "-Wno-unused-function"]
    programs = hooks.PROGRAMS[hook_set]
    if so_peercred_flags:
        programs = (*programs, hooks.SO_PEERCRED)
    return Source(source_text(folder, f"{hook_set}.c"), flags, programs, missing, why_not)


def load(
    hook_set: str,
    max_connections: int,
    max_pending: int,
    cgroup: Path | None = None,
    max_percent_per_user: int = 100,
    running: Running | None = None,
    cache: Cache | None = None,
) -> Capture:
    """Compile a hook set and have the kernel verify it; attaches nothing.

    Args:
        hook_set: one of `hooks.HOOK_SETS`.
        max_connections: room for established connections.
        max_pending: room for connections that are being made.
        cgroup: bounds `trace` to the sockets of this cgroup and of those below;
            `cgroup` is bounded by where it is attached.
        max_percent_per_user: how much of each room one user may take.
        running: whose maps to use instead of new ones; it has to have the same `layout`.
        cache: where it may have been compiled before, or is kept for the next time.

    Raises:
        KernelError: BCC or headers are missing, the kernel lacks something that is
            needed, or its verifier refused a program. One line that says which.
    """
    level = cgroup_level(cgroup) if cgroup and hook_set == "trace" else 0
    made_for = source(hook_set, bounded=level > 0)
    compiled, from_cache = _compiled(made_for, cache)
    maps = compiled.make_maps(
        {"pending": max_pending, **dict.fromkeys(_AS_MANY_AS_CONNECTIONS, max_connections)},
        running.maps if running else None,
    )
    settings = records.SETTINGS.pack(
        cgroup.stat().st_ino if cgroup and level else 0,
        level,
        running.generation if running else 0,
        *_shares(max_connections, max_pending, max_percent_per_user),
    )
    Map(maps["settings"]).update(bytes(4), settings)
    loaded = {each: _verified(compiled, each, maps) for each in hooks.PROGRAMS[hook_set]}
    so_peercred, why_no_so_peercred = None, made_for.why_no_so_peercred
    if not why_no_so_peercred:
        try:
            so_peercred = _verified(compiled, hooks.SO_PEERCRED, maps)
        except Refused as refused:
            why_no_so_peercred = str(refused.strerror)
    kept = {name: maps[name] for name in MAPS}
    return Capture(
        loaded, kept, made_for.missing_fields, so_peercred, why_no_so_peercred, from_cache
    )


def about(loaded: Capture, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a loader says of a capture that it has loaded with these settings."""
    return {
        "layout": layout(settings["max_connections"], settings["max_pending"]),
        "programs": [program.name for program in loaded.programs],
        "missing_fields": loaded.missing_fields,
        "max_percent_per_user": settings["max_percent_per_user"],
        "so_peercred": textwrap.shorten(loaded.why_no_so_peercred, REASON_LENGTH),
    }


def _shares(max_connections: int, max_pending: int, percent: int) -> tuple[int, int, int]:
    """How many connections one user may have, have under way, and have left at a server."""
    if percent == 100:  # who may have all of a table is stopped by that alone
        return (_UNLIMITED,) * 3
    connections = records.share(max_connections, percent)
    return connections, records.share(max_pending, percent), max(1, connections // 4)


def _so_peercred_macros(types: KernelTypes) -> tuple[list[str], str]:
    """Compiler flags for the program behind getsockopt(); or none, and why."""
    try:
        flags = [
            f"-DOFFSET_{macro}={types.member(path).offset}" for macro, path in SO_PEERCRED.items()
        ]
    except MemberMissing as missing:
        return [], str(missing.strerror)
    with suppress(MemberMissing):
        flags += [f"-DOFFSET_{macro}={types.member(path).offset}" for macro, path in MPTCP.items()]
    # Since Linux 6.2 (fd264ca02094); without it the caller's task takes a helper's call.
    with suppress(MemberMissing, FunctionMissing):
        flags += [
            f"-DOFFSET_sockopt_task={types.member('bpf_sockopt_kern.current_task').offset}",
            f"-DCAST_TO_KERN_CTX={KERNEL_FUNCTIONS + types.function('bpf_cast_to_kern_ctx')}",
        ]
    overflow = {
        name: int(Path(f"/proc/sys/kernel/overflow{name}").read_text()) for name in ("uid", "gid")
    }
    return [
        *flags,
        "-DSO_PEERCRED_IS_POSSIBLE",
        f"-DPAGE_SIZE={os.sysconf('SC_PAGE_SIZE')}",
        *(f"-DOVERFLOW_{name.upper()}={number}U" for name, number in overflow.items()),
    ], ""


def _compiled(made_for: Source, cache: Cache | None) -> tuple[Compiled, bool]:
    """The programs, and whether they had been compiled before."""
    key = hashlib.sha256(json.dumps([made_for, version(), os.uname()[2:]]).encode()).hexdigest()
    if cache and (kept := cache.get(key)):
        return kept, True
    compiled = compile_programs(made_for.text, made_for.flags, source_folder(), made_for.programs)
    if cache:
        cache.put(key, compiled)
    return compiled, False


def _verified(
    compiled: Compiled, program: hooks.Program | hooks.Traced, maps: Mapping[str, int]
) -> int:
    """A descriptor of the program, loaded."""
    code = compiled.programs[program.name].bound(maps)
    try:
        return program.load(code)
    except Rejected as error:
        raise Refused(f"the kernel refuses {program.name}", error.log) from error
