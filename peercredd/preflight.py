"""What this machine must have before the daemon can run on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, NamedTuple

from peercredd import defaults, pins, preemption
from peercredd.config import Config
from peercredd.hooks import HOOK_SETS
from peercredd.mounts import CgroupError, cgroup_directory, mount_points
from peercredd.so_peercred import OptIn, OptInError

_NEEDED: Final = {"CAP_SYS_ADMIN": 21}
"""Numbers of capabilities(7). For bpf(2), CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN would do;
setns(2) takes this one."""

BTF: Final = Path("/sys/kernel/btf/vmlinux")

LOADER: Final = ("-m", "peercredd.loader")
"""Arguments for Python."""

_LOADED: Final = {
    "trace": "compiled, accepted by the kernel's verifier, and attached for an instant",
    "cgroup": "compiled, and accepted by the kernel's verifier",
}


class Check(NamedTuple):
    """Something that was looked at."""

    name: str
    outcome: Literal["ok", "failed", "unknown", "unused"]
    """`unused`: a hook set that does not work, or was not tried, and that the daemon can spare."""
    detail: str
    mend: str = ""
    """What to do about it; empty when it is ok."""
    log: str = ""
    """All that was said of a failure, compiler and verifier included; may be many lines."""


def missing_capabilities() -> list[str]:
    """Name the capabilities that this process needs and does not have."""
    status = Path("/proc/self/status").read_text()
    (effective,) = (
        int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")
    )
    return [name for name, number in _NEEDED.items() if not effective & 1 << number]


def run(config: Config) -> list[Check]:
    """Do all checks, side by side."""
    checks: list[Callable[[], Check]] = [
        _capabilities,
        _btf,
        lambda: _cgroup(config.capture.cgroup),
        lambda: _bpffs(Path(config.capture.pin_dir)),
        _bcc,
        lambda: _so_peercred(config),
    ]
    hooks = config.capture.hooks
    with ThreadPoolExecutor(len(checks) + len(HOOK_SETS)) as threads:
        host = [threads.submit(check) for check in checks]
        loads = [threads.submit(_loadable, each, hooks) for each in HOOK_SETS]
        return [done.result() for done in host] + _one_is_enough([done.result() for done in loads])


def _capabilities() -> Check:
    name = "root or capabilities"
    if missing := missing_capabilities():
        return Check(name, "failed", f"lacks {', '.join(missing)}", "run it as root, with sudo")
    return Check(name, "ok", "root" if os.geteuid() == 0 else "capabilities held")


def _btf() -> Check:
    if os.access(BTF, os.R_OK):
        return Check("BTF", "ok", str(BTF))
    return Check(
        "BTF",
        "failed",
        f"{BTF} cannot be read",
        "run a kernel built with CONFIG_DEBUG_INFO_BTF=y, as distributions build theirs",
    )


def _cgroup(configured: str) -> Check:
    try:
        return Check("cgroup v2", "ok", str(cgroup_directory(configured)))
    except CgroupError as error:
        detail, _, mend = str(error).partition("; ")
        return Check("cgroup v2", "failed", detail, mend)


def _bpffs(pin_dir: Path) -> Check:
    for point in mount_points("bpf"):
        if pin_dir.is_relative_to(point):
            return Check("bpffs", "ok", f"mounted at {point}")
    if not pin_dir.is_relative_to(pins.BPFFS_MOUNT):
        return Check(
            "bpffs", "failed", f"{pin_dir} is not on one", f"name one below {pins.BPFFS_MOUNT}"
        )
    if "nodev\tbpf" in Path("/proc/filesystems").read_text().splitlines():
        return Check("bpffs", "ok", "not mounted; the daemon mounts it")
    return Check(
        "bpffs", "failed", "unknown to this kernel", "run a kernel built with CONFIG_BPF_SYSCALL=y"
    )


def _bcc() -> Check:
    # In a process of its own: BCC brings LLVM along. -P: not from the current directory.
    return _child(
        "BCC importable",
        ["-c", "from bcc import BPF"],
        ok="imported",
        mend="install python3-bpfcc, and make the environment with "
        "/usr/bin/python3 -m venv --system-site-packages",
    )


def _so_peercred(config: Config) -> Check:
    name = "SO_PEERCRED targets"
    options = config.so_peercred
    try:
        covered = cgroup_directory(config.capture.cgroup)
        # Whether the kernel takes the program is seen by loading it.
        opt_in = OptIn(
            Path(config.capture.pin_dir), Path(options.state), options.cgroups, covered, ""
        )
        opt_in.locate()
        wrong = opt_in.misconfigured()
    except CgroupError:
        return Check(name, "unknown", "nothing is captured", "see 'cgroup v2'")
    except OptInError as error:
        wrong = str(error)
    if wrong:
        detail, _, mend = wrong.partition("; ")
        return Check(name, "failed", detail, mend)
    return Check(name, "ok", ", ".join(opt_in.targets()) or "none")


def _loadable(hook_set: str, hooks: str) -> Check:
    name = f"{hook_set} loadable"
    if hooks not in ("auto", hook_set):
        return Check(name, "unused", f"not tried: capture.hooks is {hooks}")
    if missing_capabilities():
        return Check(name, "unknown", "only root can ask the verifier", "run it as root, with sudo")
    if hooks == "auto" and hook_set == "trace" and (objection := preemption.why_not_to_trace()):
        return Check(name, "unused", objection, "name it to have it all the same: --hooks trace")
    return _child(
        name,
        [*LOADER, "--dry-run", hook_set, "--log"],
        ok=_LOADED[hook_set],
        mend="run another kernel, or show the authors what peercredd check --verifier-log says",
    )


def _one_is_enough(loads: list[Check]) -> list[Check]:
    """With `auto` the daemon takes the hook set that works, so that the other need not."""
    if all(check.outcome != "ok" for check in loads):
        return loads
    return [check if check.outcome == "ok" else check._replace(outcome="unused") for check in loads]


def _child(name: str, arguments: list[str], *, ok: str, mend: str) -> Check:
    try:
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=defaults.LOADER_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        return Check(name, "unknown", f"no answer in {error.timeout:.0f} s", "try again")
    if done.returncode == 0:
        return Check(name, "ok", ok)
    *log, last_line = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    detail, _, own_mend = last_line.partition("; ")
    return Check(name, "failed", detail, own_mend or mend, "\n".join(log))
