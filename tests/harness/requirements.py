"""Whether this machine can run the tests that need root, or load BPF programs."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
from pathlib import Path
from typing import NoReturn

import pytest

from harness.cgroup import mount_point
from peercredd.libbpf import can_trace

CAPTURE_THE_HOST = ("trace", "cgroup") if os.environ.get("PEERCREDD_OWN_MACHINE") else ("trace",)
"""Hook sets with which a test may do that: `cgroup` attaches to the root cgroup then, which is left
alone unless the machine is there for the tests only."""

_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_BPF_MAP_CREATE = 0
_BPF_MAP_TYPE_ARRAY = 2


def cannot_run(reason: str) -> NoReturn:
    """Skip the present test; with PEERCREDD_REQUIRE_KERNEL=1, fail it."""
    if os.environ.get("PEERCREDD_REQUIRE_KERNEL") == "1":
        pytest.fail(f"this test is required, but: {reason}", pytrace=False)
    pytest.skip(reason)


def why_no_root() -> str | None:
    """What is missing to change owners and users, and what mends it."""
    return "not root: run the tests with sudo" if os.geteuid() else None


@functools.cache
def why_no_kernel() -> str | None:
    """The first thing that is missing, and what mends it; None when all is there."""
    if reason := why_no_root():
        return reason
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "no /sys/kernel/btf/vmlinux: boot a kernel with CONFIG_DEBUG_INFO_BTF"
    try:
        mount_point()
    except FileNotFoundError as error:
        return str(error)
    bcc = importlib.util.find_spec("bcc")
    if not bcc or not bcc.origin or not Path(bcc.origin).with_name("libbcc.py").exists():
        return "no BCC: install python3-bpfcc, and use a venv with --system-site-packages"
    return _why_no_bpf()


@functools.cache
def why_no_hook_set(name: str) -> str | None:
    """Why this machine cannot capture with a hook set; None where it can."""
    if reason := why_no_kernel():
        return reason
    if name == "trace" and not can_trace():
        return "this kernel takes no tracing programs: boot one that has fentry"
    return None


def why_no_systemd() -> str | None:
    """Why this machine has no units to start; None where systemd runs it."""
    if Path("/run/systemd/system").is_dir():  # as sd_booted(3) tells
        return None
    return f"process 1 is {Path('/proc/1/comm').read_text().strip()}"


def _why_no_bpf() -> str | None:
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        return f"no test machinery for {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    # The beginning of union bpf_attr: type, key_size, value_size, max_entries.
    attributes = (ctypes.c_uint32 * 18)(_BPF_MAP_TYPE_ARRAY, 4, 4, 1)
    size = ctypes.c_long(ctypes.sizeof(attributes))
    fd = libc.syscall(ctypes.c_long(number), _BPF_MAP_CREATE, ctypes.byref(attributes), size)
    if fd < 0:
        return f"bpf(2): {os.strerror(ctypes.get_errno())}: CAP_BPF and CONFIG_BPF_SYSCALL needed"
    os.close(fd)
    return None
