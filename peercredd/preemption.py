"""Whether the kernel interrupts its own code to run another task.

While a task is interrupted within a tracing program, the kernel skips that program for
every other task on the CPU (__bpf_prog_enter_recur() in kernel/bpf/trampoline.c). So
where it does that, `trace` misses calls, the more the busier the CPU is; programs on a
cgroup are never skipped.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_DYNAMIC = Path("/sys/kernel/debug/sched/preempt")


def model(version: str | None = None, dynamic: Path = _DYNAMIC) -> str:
    """How this kernel preempts itself: none, voluntary, lazy, full, rt or unknown.

    Args:
        version: as uname(2) gives it, which it is asked for otherwise.
        dynamic: where a kernel that can change its model says which one is chosen.
    """
    try:
        if chosen := re.search(r"\((\w+)\)", dynamic.read_text()):
            return chosen[1]
    except OSError:
        pass  # no such kernel, or no debugfs
    words = (os.uname().version if version is None else version).split()
    built = {"PREEMPT_RT": "rt", "PREEMPT_DYNAMIC": "unknown", "PREEMPT_LAZY": "lazy"}
    built |= {"PREEMPT": "full"}
    return next((built[word] for word in words if word in built), "voluntary")


def why_not_to_trace() -> str | None:
    """What speaks against `trace` on this kernel, in a line; None if nothing does."""
    found = model()
    if found in ("none", "voluntary"):
        return None
    if found == "unknown":
        return f"whether this kernel preempts itself is not known; mount debugfs: {_DYNAMIC}"
    return f"tracing programs miss calls on a kernel that preempts itself (preempt={found})"
